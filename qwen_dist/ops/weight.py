"""What a matrix product may take as its weight: an array, or a weight that is stored in fewer bits.

A quantised weight is a pytree of arrays, so it is sharded, donated and passed to jitted functions like any parameter.
Only `ops.matmul` and `ops.grouped_matmul` look inside it. `ops.grouped_weight` has the form that checkpoints are loaded in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight in fewer bits. An implementation is a registered pytree with the shape of the array that it stands for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> Any:
        """The type that `dequantize` gives."""

    def dequantize(self) -> jax.Array:
        """Return the weight as an array of `shape` and `dtype`."""

    def reshape(self, *shape: int) -> QuantizedWeight:
        """Return the same weight with other dimensions, as `jax.Array.reshape`."""

    def take(self, index: jax.Array) -> QuantizedWeight:
        """Return the weight at indices of the first dimension, such as that of one expert, or the rows of tokens."""

    def with_axes(self, axes: tuple[str, ...]) -> Any:
        """Return the same pytree with the logical names of each array's dimensions in place of the arrays.

        `axes` are those of the array that it stands for.
        """


Weight = jax.Array | QuantizedWeight


def to_array(weight: Weight) -> jax.Array:
    """Return the weight as an array: the plain form of every quantised product."""
    return weight if isinstance(weight, jax.Array) else weight.dequantize()


def take_rows(weight: Weight, index: jax.Array) -> jax.Array:
    """Return rows of a weight [V, C] as an array [*index, C]."""
    if isinstance(weight, jax.Array):
        return jnp.take(weight, index, axis=0, mode="clip")
    return weight.take(index).dequantize()


def axes_of(weight: Any, axes: tuple[str, ...]) -> Any:
    """Return the logical names of the dimensions of a weight, as a tuple, or of each array of a quantised one."""
    return weight.with_axes(axes) if isinstance(weight, QuantizedWeight) else axes


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Of which arrays a parameter consists, and how they become its `Weight`.

    Attributes:
      name: for error messages.
      tensors: (shape, dtype, axes) of the weight → by suffix of the parameter's name, the shape, dtype and logical axes of
        each array. The suffix of an ordinary array is "".
      assemble: the arrays by suffix → the weight.
    """

    name: str
    tensors: Callable[[tuple[int, ...], DTypeLike, tuple[str, ...]], Mapping[str, TensorSpec]]
    assemble: Callable[[Mapping[str, jax.Array]], Weight]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One array of a parameter: its shape, its dtype and the logical name of each dimension."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[str, ...]


# A parameter that is one array, as published checkpoints in 16 or 32 bits have them.
ARRAY = WeightFormat(
    "array",
    lambda shape, dtype, axes: {"": TensorSpec(shape, dtype, axes)},
    lambda tensors: tensors[""],
)
