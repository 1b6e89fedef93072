"""A weight in 8 or 4 bits with a scale for each group of in-features.

An element is (value - zero point) · scale, computed in float32 and rounded to the dtype of the scale: what transformers,
GPTQModel, AutoAWQ and compressed-tensors compute of the same numbers. Block-wise FP8 is such a weight, too: each row of a
block has the block's scale, in float32.

Every array has the out-features first, then *units* of consecutive in-features, then what one unit holds, so that a shard
boundary never cuts a group. The groups of an output are contiguous, and a kernel reads them as one stream:

- `values` [*O, runs, run]: int8 or float8. 4 bits are [*O, runs, run / 2] bytes: byte i of a run of R elements has element
  i in its low bits and element i + R/2 in its high ones, plus 8, so that widening a run needs no exchange between lanes.
- `scale` [*O, groups, 1], and `zero_point` of the same shape in int8, less the same 8.
- `group_index` [runs, run]: the group of each in-feature, where groups are not consecutive (GPTQ's `desc_act`).

Letters: O out-features (any number of dimensions), C in-features, G groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_dist.ops.rounding import rounded
from qwen_dist.ops.weight import TensorSpec, WeightFormat

Encoding = Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2"]

# Elements of a run: 4 bits of them are 16 bytes. Shorter where the group is no multiple of it.
RUN = 32
# What is added to a signed 4-bit value to store it.
INT4_OFFSET = 8
SCALE, ZERO_POINT, GROUP_INDEX = "_scale", "_zero_point", "_group_index"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "zero_point", "group_index"],
    meta_fields=["dtype"],
)
@dataclasses.dataclass(frozen=True)
class GroupedWeight:
    """See the module. `dtype` is what `dequantize` gives; bytes without a sign hold two values."""

    values: Any
    scale: Any
    zero_point: Any
    group_index: Any
    dtype: Any

    @property
    def is_int4(self) -> bool:
        return self.values.dtype == jnp.uint8

    @property
    def run(self) -> int:
        """The in-features of a run."""
        return self.values.shape[-1] * (2 if self.is_int4 else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], self.values.shape[-2] * self.run)

    @property
    def ndim(self) -> int:
        return self.values.ndim - 1

    def dequantize(self) -> jax.Array:
        *out, num_in = self.shape
        values = unpack_runs(self.values) if self.is_int4 else self.values
        scale, zero_point = self.scale, self.zero_point
        if self.group_index is not None:
            index_C = self.group_index.reshape(-1)
            scale, zero_point = (None if x is None else jnp.take(x, index_C, axis=-2) for x in (scale, zero_point))
        values = values.reshape(*out, scale.shape[-2], -1).astype(jnp.float32)
        if zero_point is not None:
            values = values - zero_point.astype(jnp.float32)
        product = rounded(values * scale.astype(jnp.float32), scale.dtype)
        return product.astype(self.dtype).reshape(*out, num_in)

    def reshape(self, *shape: int) -> GroupedWeight:
        assert shape[-1] == self.shape[-1], f"in-features cannot be reshaped: {self.shape} to {shape}"
        arrays = {
            name: None if (x := getattr(self, name)) is None else x.reshape(*shape[:-1], *x.shape[-2:])
            for name in ("values", "scale", "zero_point")
        }
        return dataclasses.replace(self, **arrays)

    def take(self, index: jax.Array) -> GroupedWeight:
        def pick(x: Any) -> Any:
            if index.ndim == 0:
                return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
            return jnp.take(x, index, axis=0, mode="clip")

        # Which group an in-feature is of does not depend on the out-features.
        rows = jax.tree.map(pick, dataclasses.replace(self, group_index=None))
        return dataclasses.replace(rows, group_index=self.group_index)

    def with_axes(self, axes: tuple[str, ...]) -> GroupedWeight:
        out, in_axis = axes[: self.ndim - 1], axes[self.ndim - 1]
        scale = (*out, in_axis if self.scale.shape[-2] > 1 else "group", "group")
        zero_point = None if self.zero_point is None else scale
        group_index = None if self.group_index is None else (in_axis, "group")
        return dataclasses.replace(
            self, values=(*out, in_axis, "group"), scale=scale, zero_point=zero_point, group_index=group_index
        )


def unpack_runs(packed: Any) -> Any:
    """Return the signed values of packed runs of 4 bits: [..., R / 2] bytes to [..., R] int8. Takes jax or NumPy arrays."""
    both = [(packed & 15).astype(jnp.int8), (packed >> 4).astype(jnp.int8)]
    return jnp.concatenate(both, axis=-1) - jnp.int8(INT4_OFFSET)


@dataclasses.dataclass(frozen=True)
class GroupedFormat:
    """The form in which a `GroupedWeight` is kept.

    Attributes:
      encoding: of the values.
      in_features: C, the product of the weight's last dimensions.
      group_size: in-features with one scale; `in_features` for one scale of each output.
      scale_dtype: of the scales.
      dtype: what it is dequantised to.
      has_zero_point, has_group_index: whether it has these arrays.
    """

    encoding: Encoding
    in_features: int
    group_size: int
    scale_dtype: str
    dtype: str
    has_zero_point: bool = False
    has_group_index: bool = False

    def __post_init__(self) -> None:
        assert self.in_features % self.group_size == 0, f"groups of {self.group_size} in {self.in_features}"

    @property
    def run(self) -> int:
        """The elements of a run."""
        return math.gcd(self.group_size, RUN)

    @property
    def run_width(self) -> int:
        """The elements of `values` that a run takes."""
        return self.run // 2 if self.encoding == "int4" else self.run

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def num_units(self) -> int:
        """How many parts the in-features may be divided into: groups, or runs of the only one."""
        return self.num_groups if self.num_groups > 1 else self.in_features // self.run

    @property
    def values_dtype(self) -> str:
        return "uint8" if self.encoding == "int4" else self.encoding

    def out_dims(self, shape: tuple[int, ...]) -> int:
        """Return how many dimensions of a weight of this shape are out-features."""
        return next(dim for dim in reversed(range(len(shape))) if math.prod(shape[dim:]) == self.in_features)

    def tensors(self, shape: tuple[int, ...], dtype: DTypeLike, axes: tuple[str, ...]) -> Mapping[str, TensorSpec]:
        dims = self.out_dims(shape)
        out, out_axes, in_axis = shape[:dims], axes[:dims], axes[dims]
        num_runs = self.in_features // self.run
        specs = {"": TensorSpec((*out, num_runs, self.run_width), self.values_dtype, (*out_axes, in_axis, "group"))}
        of_groups = (*out_axes, in_axis if self.num_groups > 1 else "group", "group")
        specs[SCALE] = TensorSpec((*out, self.num_groups, 1), self.scale_dtype, of_groups)
        if self.has_zero_point:
            specs[ZERO_POINT] = TensorSpec((*out, self.num_groups, 1), "int8", of_groups)
        if self.has_group_index:
            # Any in-feature may be of any group, so every device has all scales.
            specs[SCALE] = dataclasses.replace(specs[SCALE], axes=(*out_axes, "group", "group"))
            if self.has_zero_point:
                specs[ZERO_POINT] = dataclasses.replace(specs[ZERO_POINT], axes=(*out_axes, "group", "group"))
            specs[GROUP_INDEX] = TensorSpec((num_runs, self.run), "int32", (in_axis, "group"))
        return specs

    def assemble(self, tensors: Mapping[str, Any]) -> GroupedWeight:
        zero_point, group_index = tensors.get(ZERO_POINT), tensors.get(GROUP_INDEX)
        return GroupedWeight(tensors[""], tensors[SCALE], zero_point, group_index, jnp.dtype(self.dtype))


@functools.lru_cache
def grouped_format(form: GroupedFormat) -> WeightFormat:
    """Return the format as a parameter has it: one object for equal forms, so that equal layers are compiled once."""
    return WeightFormat(form.encoding, form.tensors, form.assemble)
