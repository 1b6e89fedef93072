"""The workload of a plan: the command, the batch size and context length, and the programs that these need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from qwen_dist.checkpoint.quantized import Quantization
from qwen_dist.config import LoraOptions
from qwen_dist.engine.engine import CHUNK_SIZE, MAX_CHUNKS, cache_limits
from qwen_dist.errors import UsageError
from qwen_dist.models.state_spec import CacheDtype, LayerStateSpec
from qwen_dist.sharding import INFERENCE, TRAIN, RuleSet, ShardingContext

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
      quantization: which weights are kept in fewer bits; None: none.
      cache_dtype: of keys and values in the cache; None: `dtype`.
    """

    command: Literal["batch", "finetune"]
    batch: int
    context: int
    dtype: str = "bfloat16"
    remat: Literal["none", "selective", "full"] = "full"
    lora: LoraOptions | None = None
    quantization: Quantization | None = None
    cache_dtype: CacheDtype | None = None

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

    def pages(self, specs: Sequence[LayerStateSpec], sharding_ctx: ShardingContext) -> tuple[int, ...]:
        """Return the pages of a sequence of `context` tokens, of each cache group."""
        limits = cache_limits(specs, sharding_ctx, num_slots=self.batch, max_length=self.context)
        return limits.of_sequence(self.context)

    def tokens_of(self, phase: Phase, num_shards: int) -> tuple[int, int]:
        """Return the number of rows in one step, and the tokens of each.

        A row of a prefill step is a chunk of a prompt, so their number does not depend on the batch size.

        Args:
          phase: which program.
          num_shards: the number of data-parallel shards.
        """
        if phase == "prefill":
            return num_shards * MAX_CHUNKS, CHUNK_SIZE
        return self.batch, self.context if phase == "train" else 1
