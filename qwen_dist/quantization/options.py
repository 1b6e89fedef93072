"""What a weight is quantised to while it loads, and which weights stay as they are."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from qwen_dist.config import KvCacheDtype, Quantize, QuantizedWeightOptions
from qwen_dist.errors import UsageError
from qwen_dist.models.state_spec import CacheDtype
from qwen_dist.ops.grouped_weight import Encoding, GroupedFormat

# What --quantize quantises to; "stored" is as the checkpoint has the weights, "none" is not at all.
ENCODINGS: dict[str, Encoding] = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
CACHE_DTYPES: dict[KvCacheDtype, CacheDtype | None] = {"auto": None, "int8": "int8", "fp8": "float8_e4m3fn"}
# In-features with one scale where none are given; 0 is all of a row.
DEFAULT_GROUPS: dict[Encoding, int] = {"int8": 128, "int4": 32, "float8_e4m3fn": 0}
# Layers that published quantised checkpoints leave in 16 bits, transformers' `modules_to_not_convert`: embedding, head,
# routers, and the gates of delta nets.
NOT_CONVERTED = re.compile(r"(^|\.)(embed_tokens|lm_head|gate|shared_expert_gate|in_proj_a|in_proj_b|in_proj_ba)$")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise.

    Attributes:
      encoding: of the values.
      group_size: in-features with one scale; 0: all of a row.
      has_head: the output weights, which may be the embedding's, are quantised to 8 bits, too.
    """

    encoding: Encoding
    group_size: int
    has_head: bool = False

    @classmethod
    def of(
        cls, quantize: Quantize, group_size: int | None = None, *, has_head: bool = False
    ) -> QuantizeOptions | Literal["stored", "none"]:
        """Return the options that `--quantize` and the flags after it give. Raises UsageError."""
        if quantize == "stored" or quantize == "none":
            given = [] if group_size is None else [f"--quantize-group-size {group_size}"]
            if given := given + ["model.quantize_head"] * has_head:
                forms = ", ".join(ENCODINGS)
                raise UsageError(f"{' and '.join(given)} needs --quantize {forms}; it is {quantize}")
            return quantize
        encoding = ENCODINGS[quantize]
        if group_size is not None and (group_size < 0 or group_size % 2):
            raise UsageError(
                f"--quantize-group-size is {group_size}; it must be an even number such as 32 or 128, or 0 for one scale "
                "of each row"
            )
        return cls(encoding, DEFAULT_GROUPS[encoding] if group_size is None else group_size, has_head)

    @classmethod
    def of_model(cls, options: QuantizedWeightOptions) -> QuantizeOptions | Literal["stored", "none"]:
        """Return the options of a configuration. Raises UsageError as `of`."""
        return cls.of(options.quantize, options.quantize_group_size, has_head=options.quantize_head)

    def form(self, in_features: int, dtype: str) -> GroupedFormat:
        """Return the form of a weight with these in-features, which the group size must divide."""
        scale_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
        return GroupedFormat(self.encoding, in_features, self.group_size or in_features, scale_dtype, dtype)

    def head_form(self, in_features: int, dtype: str) -> GroupedFormat:
        """Return the form of the output weights: 8 bits, in groups if these divide it."""
        group = DEFAULT_GROUPS["int8"]
        options = QuantizeOptions("int8", group if in_features % group == 0 else 0)
        return options.form(in_features, dtype)


def is_not_converted(layer: str) -> bool:
    """Return whether a linear layer stays as it is, by its name."""
    return NOT_CONVERTED.search(layer) is not None
