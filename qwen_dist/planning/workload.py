"""The workload of a plan: the command, the batch size and context length, and the programs that these need."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qwen_dist.config import LoraOptions
from qwen_dist.engine.engine import BLOCK, NUM_BLOCKS
from qwen_dist.engine.pages import Kinds, Needs
from qwen_dist.errors import UsageError
from qwen_dist.models.cache import PAGE
from qwen_dist.sharding import INFERENCE, TRAIN, RuleSet

Phase = Literal["prefill", "decode", "train"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The workload to plan for.

    Attributes:
      command: batch inference or finetuning.
      batch: sequences at a time, on all devices together.
      context: tokens of each sequence, prompt and answer together.
      dtype: of parameters, activations and KV cache.
      remat: what the backward pass of finetune recomputes, see `config.FinetuneConfig`.
      lora: the adapters that finetune trains; None trains all parameters.
    """

    command: Literal["batch", "finetune"]
    batch: int
    context: int
    dtype: str = "bfloat16"
    remat: Literal["none", "selective", "full"] = "full"
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        sizes = {"batch-size": self.batch, "context": self.context}
        if wrong := [f"--{name} {size}: give at least 1" for name, size in sizes.items() if size < 1]:
            raise UsageError("; ".join(wrong))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ("prefill", "decode") if self.command == "batch" else ("train",)

    @property
    def rules(self) -> RuleSet:
        return INFERENCE if self.command == "batch" else TRAIN

    def pages(self, kinds: Kinds) -> dict[int | None, int]:
        """Return the pages of a sequence of `context` tokens, by sliding window."""
        ahead = NUM_BLOCKS * BLOCK
        needs = Needs(kinds, num_rows=self.batch, page_size=PAGE, max_length=self.context, ahead=ahead)
        return dict(zip(needs.windows, needs.of_sequence(self.context), strict=True))

    def tokens_of(self, phase: Phase, parts: int) -> tuple[int, int]:
        """Return the number of rows in one step, and the tokens of each.

        A row of a prefill step is a chunk of a prompt, so their number does not depend on the batch size.

        Args:
          phase: which program.
          parts: the number of data-parallel shards that the batch is split over.
        """
        if phase == "prefill":
            return parts * NUM_BLOCKS, BLOCK
        return self.batch, self.context if phase == "train" else 1
