"""What is planned: the verb, how many rows of how many tokens, and the programs that follow from them."""

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
    """`batch` rows at a time on all devices together, `context` tokens each, prompt and answer together.

    remat, of finetune, is what the backward pass computes again: nothing, all but the products with weights, or whole
    blocks, of which it then has what goes in. lora, of finetune: the adapters that are trained, and nothing else; None
    trains all parameters.
    """

    verb: Literal["batch", "finetune"]
    batch: int
    context: int
    dtype: str = "bfloat16"
    remat: Literal["none", "products", "blocks"] = "blocks"
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        sizes = {"batch": self.batch, "context": self.context}
        if wrong := [f"--{name} {size}: give at least 1" for name, size in sizes.items() if size < 1]:
            raise UsageError("; ".join(wrong))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ("prefill", "decode") if self.verb == "batch" else ("train",)

    @property
    def rules(self) -> RuleSet:
        return INFERENCE if self.verb == "batch" else TRAIN

    def pages(self, kinds: Kinds) -> dict[int | None, int]:
        """Pages of each kind of layers that a row of the whole context has."""
        ahead = NUM_BLOCKS * BLOCK
        needs = Needs(kinds, num_rows=self.batch, page_size=PAGE, max_length=self.context, ahead=ahead)
        return dict(zip(needs.windows, needs.of_sequence(self.context), strict=True))

    def tokens_of(self, phase: Phase, parts: int) -> tuple[int, int]:
        """Rows and tokens of each of one step; `parts` is over how many parts of the mesh rows are split.

        Prompts are read in blocks, which are the rows of that step, whatever the batch is.
        """
        if phase == "prefill":
            return parts * NUM_BLOCKS, BLOCK
        return self.batch, self.context if phase == "train" else 1
