"""What a weight is quantised to while it loads, and which weights stay as they are."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from qwen_dist.config import Quantize
from qwen_dist.errors import UsageError
from qwen_dist.ops.grouped_weight import Encoding, GroupedFormat

# What --quantize quantises to; "stored" is as the checkpoint has the weights, "none" is not at all.
ENCODINGS: dict[str, Encoding] = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
# In-features with one scale where none are given; 0 is all of a row.
DEFAULT_GROUPS: dict[Encoding, int] = {"int8": 128, "int4": 32, "float8_e4m3fn": 0}
# Linear layers that published quantised checkpoints leave in 16 bits: the head, routers, and the gates of delta nets.
KEPT = re.compile(r"(^|\.)(lm_head|gate|shared_expert_gate|in_proj_a|in_proj_b|in_proj_ba)$")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise.

    Attributes:
      encoding: of the values.
      group_size: in-features with one scale; 0: all of a row.
    """

    encoding: Encoding
    group_size: int

    @classmethod
    def of(
        cls, quantize: Quantize, group_size: int | None = None
    ) -> QuantizeOptions | Literal["stored", "none"]:
        """Return the options that `--quantize` and `--quantize-group-size` give. Raises UsageError."""
        if quantize == "stored" or quantize == "none":
            if group_size is not None:
                raise UsageError(
                    f"--quantize-group-size {group_size} needs --quantize {', '.join(ENCODINGS)}; it is {quantize}"
                )
            return quantize
        encoding = ENCODINGS[quantize]
        if group_size is not None and (group_size < 0 or group_size % 2):
            raise UsageError(
                f"--quantize-group-size is {group_size}; it must be an even number such as 32 or 128, or 0 for one scale "
                "of each row"
            )
        return cls(encoding, DEFAULT_GROUPS[encoding] if group_size is None else group_size)

    def form(self, in_features: int, dtype: str) -> GroupedFormat:
        """Return the form of a weight with these in-features, which the group size must divide."""
        scale_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
        return GroupedFormat(self.encoding, in_features, self.group_size or in_features, scale_dtype, dtype)


def is_kept(layer: str) -> bool:
    """Return whether a linear layer stays as it is, by its name."""
    return KEPT.search(layer) is not None
