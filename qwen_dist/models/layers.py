"""Linear, embedding and normalisation layers, with their parameters in the checkpoint's names and memory order.

Letters: B batch, T length, X selected tokens of a row, D embed, V vocab, R lora_rank.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import observed
from qwen_dist.models.parameters import declare_param
from qwen_dist.ops.adapter_rows import select_adapter
from qwen_dist.ops.matmul import accum_dtype, matmul
from qwen_dist.ops.rounding import rounded
from qwen_dist.ops.weight import take_rows
from qwen_dist.sharding import all_gather_weight


def parameter(
    out: dict[str, int],
    inp: dict[str, int] | None = None,
    *,
    dtype: DTypeLike,
    std: float | None = None,
    disk_shape: tuple[int, ...] | None = None,
    sections: tuple[int, ...] = (),
) -> nnx.Param:
    """Declare a parameter [*out, *inp] by the logical name and size of each dimension.

    On disk `out` is one dimension and `inp` another, or it has `disk_shape`. `std`, `sections`: see `declare_param`.
    """
    sizes = out | (inp or {})
    shape = disk_shape or tuple(math.prod(dims.values()) for dims in (out, inp) if dims)
    value = jax.ShapeDtypeStruct(tuple(sizes.values()), dtype)
    return declare_param(value, tuple(sizes), std=std, disk_shape=shape, sections=sections)


def take_positions(x_BT: jax.Array, index_BX: jax.Array, otherwise: int = 0) -> jax.Array:
    """Return the elements of each row [T, …] at its indices: [B, X, …]; `otherwise` where an index is negative."""
    index = index_BX.reshape(*index_BX.shape, *(1,) * (x_BT.ndim - 2))
    return jnp.where(index < 0, jnp.array(otherwise, x_BT.dtype), jnp.take_along_axis(x_BT, jnp.maximum(index, 0), axis=1))


class Linear(nnx.Module):
    """y = x Wᵀ + b, with `weight` [*out, *in] and `bias` [*out]; rounds once, after the bias.

    `out` and `inp` map each dimension's logical name to its size: heads are separate dimensions here, although the
    checkpoint stores them flattened; the bytes are the same. What training shards over fsdp is gathered here, for use.
    """

    def __init__(
        self,
        out: dict[str, int],
        inp: dict[str, int],
        *,
        bias: bool,
        dtype: DTypeLike,
        std: float,
        sections: tuple[int, ...] = (),
    ):
        self.weight = parameter(out, inp, dtype=dtype, std=std, sections=sections)
        self.sections = sections
        self.bias = parameter(out, dtype=dtype, std=std) if bias else None
        self.out_sizes, self.in_sizes = tuple(out.items()), tuple(inp.items())
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None
        self.lora_scale = 0.0

    def add_lora(self, rank: int, scale: float, *, dtype: DTypeLike) -> None:
        """Add a low-rank adapter (arXiv:2106.09685): y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ, with A [R, *in] and B [*out, R].

        Random values leave y unchanged: A has the variance of peft's, and B is 0.
        """
        in_features = math.prod(size for _, size in self.in_sizes)
        narrow, std = {"lora_rank": rank}, (3 * in_features) ** -0.5
        self.lora_A = nnx.data(Linear(narrow, dict(self.in_sizes), bias=False, dtype=dtype, std=std))
        lora_B = Linear(dict(self.out_sizes), narrow, bias=False, dtype=dtype, std=0.0, sections=self.sections)
        self.lora_B = nnx.data(lora_B)
        self.lora_scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._project(x, x.dtype)

    def to_accumulator(self, x: jax.Array) -> jax.Array:
        """Return y in at least float32, before it is rounded to x's dtype."""
        return self._project(x, accum_dtype(x.dtype))

    def _project(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        weight = all_gather_weight(self.weight.get_value(), *dict(self.out_sizes + self.in_sizes))
        in_shape, out_shape = ([size for _, size in sizes] for sizes in (self.in_sizes, self.out_sizes))
        rows = observed(self, x.reshape(*x.shape[: x.ndim - len(in_shape)], -1))
        is_complete = self.bias is None and self.lora_A is None
        y = matmul(rows, weight.reshape(-1, rows.shape[-1]), dtype if is_complete else None)
        y = y.reshape(*y.shape[:-1], *out_shape)
        if self.bias is not None:
            y = y + all_gather_weight(self.bias[...], *dict(self.out_sizes)).astype(y.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + self.lora_scale * self.lora_B.to_accumulator(select_adapter(self.lora_A(x)))
        return y.astype(dtype)


class Embedding(nnx.Module):
    """A table [V, D] in which token ids are looked up; tied output weights are the same table."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike, std: float):
        self.weight = parameter({"vocab": vocab}, {"embed": embed}, dtype=dtype, std=std)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # The table stays sharded: the rows that tokens find are smaller than the table, and travel instead.
        return take_rows(self.weight.get_value(), tokens_BT)


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467); cast back *before* the weight, as Qwen's is.

    With `offset` it is x / rms(x) · (1 + weight), cast back *after* it, as in Qwen3-Next and Qwen3.5.
    """

    def __init__(self, axis: str, size: int, *, eps: float, dtype: DTypeLike, offset: bool = False):
        self.weight = parameter({axis: size}, dtype=dtype, std=0.0 if offset else None)
        self.axis, self.eps, self.offset = axis, eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(accum_dtype(x.dtype))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        # Broadcast in float32: then its gradient, the sum over all tokens, is also in float32 and rounded once.
        weight = jnp.broadcast_to(all_gather_weight(self.weight[...], self.axis).astype(wide.dtype), x.shape)
        if self.offset:
            return (normed * (1 + weight)).astype(x.dtype)
        return weight.astype(x.dtype) * rounded(normed, x.dtype).astype(x.dtype)
