"""Linear, embedding and normalisation layers, with their parameters in the checkpoint's names and memory order."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.sharding import annotate


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The type to accumulate, normalise and rotate in: float32, or float64 when the model runs in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def parameter(
    out: dict[str, int], inp: dict[str, int] | None = None, *, dtype: DTypeLike, std: float | None = None
) -> nnx.Param:
    """A parameter [*out, *inp] still without a value: the logical name and size of each dimension.

    On disk `out` is one dimension and `inp` another. `std` is the standard deviation of the normal distribution that
    random values are drawn from; None means ones.
    """
    sizes = out | (inp or {})
    disk_shape = tuple(math.prod(part.values()) for part in (out, inp) if part)
    return annotate(jax.ShapeDtypeStruct(tuple(sizes.values()), dtype), tuple(sizes), std=std, disk_shape=disk_shape)


def contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply [..., in] with an out-features-first [out, in]: [..., out] in at least float32.

    A narrower result would be rounded twice by PyTorch's measure, and is 10 times slower on XLA's CPU backend. A single
    row of a 16-bit type would fall off that backend's fast path, so it gets company; elsewhere a second row is free.
    """
    if x.size == x.shape[-1] and x.dtype.itemsize < 4:
        two_rows = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
        return contract(two_rows, weight)[:1]
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=at_least_float32(x.dtype)
    )


class Linear(nnx.Module):
    """y = x Wᵀ + b, with `weight` [*out, *in] and `bias` [*out]; rounds once, after the bias.

    `out` and `inp` map each dimension's logical name to its size, so heads are dimensions of their own although the
    checkpoint stores them flattened: the bytes are the same.
    """

    def __init__(self, out: dict[str, int], inp: dict[str, int], *, bias: bool, dtype: DTypeLike, std: float):
        self.weight = parameter(out, inp, dtype=dtype, std=std)
        self.bias = parameter(out, dtype=dtype, std=std) if bias else None
        self.out, self.num_in = tuple(out.values()), math.prod(inp.values())
        self.num_contracted = len(inp)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.unrounded(x).astype(x.dtype)

    def unrounded(self, x: jax.Array) -> jax.Array:
        """The same in at least float32, before the rounding to x's dtype."""
        x = x.reshape(*x.shape[: x.ndim - self.num_contracted], self.num_in)
        y = contract(x, self.weight[...].reshape(-1, self.num_in))
        y = y.reshape(*y.shape[:-1], *self.out)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """A table [V, D]: `__call__` looks token ids up, `attend` scores vectors against every row (tied output weights)."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike, std: float):
        self.weight = parameter({"vocab": vocab}, {"embed": embed}, dtype=dtype, std=std)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], tokens_BT, axis=0, mode="clip")

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        return contract(x_BTD, self.weight[...])


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467); cast back *before* the weight, as Qwen's is."""

    def __init__(self, axis: str, size: int, *, eps: float, dtype: DTypeLike):
        self.weight = parameter({axis: size}, dtype=dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        # Repeated while it is wide: then its gradient, the sum over all tokens, is taken in float32 and rounded once.
        weight = jnp.broadcast_to(self.weight[...].astype(wide.dtype), x.shape)
        return weight.astype(x.dtype) * normed
