"""Linear, embedding and normalisation layers, with their parameters in the checkpoint's names and memory order."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models import native
from qwen_dist.sharding import all_gather_weight, declare_param, infers_on_one_cpu


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
    return declare_param(jax.ShapeDtypeStruct(tuple(sizes.values()), dtype), tuple(sizes), std=std, disk_shape=disk_shape)


def take_positions(x_BT: jax.Array, index_B: jax.Array, otherwise: int = 0) -> jax.Array:
    """Of each row [T, …] the element at its index, [B, 1, …]; `otherwise` where the index is negative."""
    index = index_B.reshape(-1, *(1,) * (x_BT.ndim - 1))
    return jnp.where(index < 0, jnp.array(otherwise, x_BT.dtype), jnp.take_along_axis(x_BT, jnp.maximum(index, 0), axis=1))


def matmul(x: jax.Array, weight: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Multiply [..., in] with an out-features-first [out, in]: [..., out], summed in at least float32 and returned so, or
    rounded once to `dtype`.

    A narrower sum would be rounded twice by PyTorch's measure, and is 10 times slower on XLA's CPU backend. A single
    row of a 16-bit type would fall off that backend's fast path, so it gets company; elsewhere a second row is free.
    """
    dtype = jnp.dtype(at_least_float32(x.dtype) if dtype is None else dtype)
    if _is_native(x, weight, dtype):
        return _native_product(x, weight, dtype)
    if x.size == x.shape[-1] and x.dtype.itemsize < 4:
        two_rows = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
        return matmul(two_rows, weight, dtype)[:1]
    return product(x, weight).astype(dtype)


@jax.custom_vjp
def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply [*batch, ..., in] with [*batch, out, in], matrix by matrix: [*batch, ..., out] in at least float32."""
    rows_first = functools.partial(_dot, y_dim=y.ndim - 1)
    if _is_weight_first(x, y):
        return jax.lax.platform_dependent(x, y, cpu=weight_first, default=rows_first)
    return rows_first(x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _native_product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`matmul` by this project's kernel, with the gradient of `product`."""
    return native.product(x, weight, dtype)


def _is_native(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> bool:
    """Inference on one CPU; training multiplies many rows, which XLA does as fast."""
    return infers_on_one_cpu() and native.can_multiply(x, weight, dtype)


def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`matmul` as the weight times the rows, transposed: on XLA's CPU backend faster for few rows.

    The operand that comes second is packed anew for each product, so that had better be the smaller one.
    """
    dims = ((1,), (x.ndim - 1,)), ((), ())
    product = jax.lax.dot_general(weight, x, dims, preferred_element_type=at_least_float32(x.dtype))
    # Without the barrier XLA would swap the two again, to save the transposition.
    return jnp.moveaxis(jax.lax.optimization_barrier(product), 0, -1)


def _is_weight_first(x: jax.Array, weight: jax.Array) -> bool:
    """As measured on the shapes of a 0.5B model. Of 16-bit floats that backend multiplies 16 rows at a time, or pads."""
    num_rows = x.size // x.shape[-1]
    if weight.ndim > 2:
        return False
    if x.dtype.itemsize >= 4:
        return 2 <= num_rows <= 64
    return num_rows in (16, 32, 64) or (num_rows < 16 and weight.shape[0] < weight.shape[1])


def _product_forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, y), (x, y)


def _product_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of the operands' own type, as PyTorch's are; by default jax would widen them, at half the speed."""
    x, y = operands
    gradient = gradient.astype(x.dtype)
    by_x, by_y = _dot(gradient, y, y.ndim - 2), sum_over_rows(gradient, x, y.ndim - 2)
    return by_x.astype(x.dtype), by_y.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)
_native_product.defvjp(
    lambda x, weight, dtype: (_native_product(x, weight, dtype), (x, weight)),
    lambda _dtype, operands, gradient: _product_backward(operands, gradient),
)


def _dot(x: jax.Array, y: jax.Array, y_dim: int) -> jax.Array:
    """Sum over the last dimension of x and one of the last two of y, in at least float32; y's others are a batch."""
    batch = tuple(range(y.ndim - 2))
    dims = ((x.ndim - 1,), (y_dim,)), (batch, batch)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=at_least_float32(x.dtype))


# Not more columns than a rank or a head has.
_NARROW = 128


def sum_over_rows(x: jax.Array, y: jax.Array, num_batch: int) -> jax.Array:
    """[*batch, ..., out] and [*batch, ..., in]: [*batch, out, in] in at least float32, summed over all rows between.

    XLA's CPU backend turns the first operand over, so a narrow one stands there: the gradient of a low-rank matrix, or of
    the keys, then takes a quarter of the time. And it multiplies 16-bit floats fast only when it has the rows in order.
    Summing over two dimensions makes it put them so; over one it would widen both to float32 and take twice the time.
    """
    if y.shape[-1] <= _NARROW < x.shape[-1]:
        # XLA would put the operands back where they were, to save a transposition.
        return jax.lax.optimization_barrier(sum_over_rows(y, x, num_batch)).swapaxes(-1, -2)
    num_rows = math.prod(x.shape[num_batch:-1])
    parts = (2, num_rows // 2) if x.dtype.itemsize < 4 and num_rows % 2 == 0 else (1, num_rows)
    x, y = (z.reshape(*z.shape[:num_batch], *parts, z.shape[-1]) for z in (x, y))
    batch, rows = tuple(range(num_batch)), (num_batch, num_batch + 1)
    dims = (rows, rows), (batch, batch)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=at_least_float32(x.dtype))


class Linear(nnx.Module):
    """y = x Wᵀ + b, with `weight` [*out, *in] and `bias` [*out]; rounds once, after the bias.

    `out` and `inp` map each dimension's logical name to its size, so heads are dimensions of their own although the
    checkpoint stores them flattened: the bytes are the same.

    The weight is used as activations are cut: what training spreads over more devices is gathered here, where it is needed.
    """

    def __init__(self, out: dict[str, int], inp: dict[str, int], *, bias: bool, dtype: DTypeLike, std: float):
        self.weight = parameter(out, inp, dtype=dtype, std=std)
        self.bias = parameter(out, dtype=dtype, std=std) if bias else None
        self.out_sizes, self.in_sizes = tuple(out.items()), tuple(inp.items())
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None
        self.lora_scale = 0.0

    def add_lora(self, rank: int, scale: float, *, dtype: DTypeLike) -> None:
        """Add a low-rank adapter (arXiv:2106.09685): y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ, with A [R, *in] and B [*out, R].

        Random values leave y as it is: A is drawn as peft draws it, by its variance, and B is 0.
        """
        in_features = math.prod(size for _, size in self.in_sizes)
        narrow, std = {"lora_rank": rank}, (3 * in_features) ** -0.5
        self.lora_A = nnx.data(Linear(narrow, dict(self.in_sizes), bias=False, dtype=dtype, std=std))
        self.lora_B = nnx.data(Linear(dict(self.out_sizes), narrow, bias=False, dtype=dtype, std=0.0))
        self.lora_scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._rounded_to(x.dtype, x)

    def unrounded(self, x: jax.Array) -> jax.Array:
        """The same in at least float32, before the rounding to x's dtype."""
        return self._rounded_to(at_least_float32(x.dtype), x)

    def _rounded_to(self, dtype: DTypeLike, x: jax.Array) -> jax.Array:
        weight = all_gather_weight(self.weight[...], *dict(self.out_sizes + self.in_sizes))
        in_shape, out_shape = ([size for _, size in sizes] for sizes in (self.in_sizes, self.out_sizes))
        rows = x.reshape(*x.shape[: x.ndim - len(in_shape)], -1)
        is_all = self.bias is None and self.lora_A is None
        y = matmul(rows, weight.reshape(-1, rows.shape[-1]), dtype if is_all else None)
        y = y.reshape(*y.shape[:-1], *out_shape)
        if self.bias is not None:
            y = y + all_gather_weight(self.bias[...], *dict(self.out_sizes)).astype(y.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + self.lora_scale * self.lora_B.unrounded(self.lora_A(x))
        return y.astype(dtype)


class Embedding(nnx.Module):
    """A table [V, D] in which token ids are looked up; tied output weights are the same table."""

    def __init__(self, vocab: int, embed: int, *, dtype: DTypeLike, std: float):
        self.weight = parameter({"vocab": vocab}, {"embed": embed}, dtype=dtype, std=std)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # The table stays as it is cut: tokens are less than it is, and what they find travels to them.
        return jnp.take(self.weight[...], tokens_BT, axis=0, mode="clip")


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467); cast back *before* the weight, as Qwen's is."""

    def __init__(self, axis: str, size: int, *, eps: float, dtype: DTypeLike):
        self.weight = parameter({axis: size}, dtype=dtype)
        self.axis, self.eps = axis, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        # Repeated while it is wide: then its gradient, the sum over all tokens, is taken in float32 and rounded once.
        weight = jnp.broadcast_to(all_gather_weight(self.weight[...], self.axis).astype(wide.dtype), x.shape)
        return weight.astype(x.dtype) * normed
