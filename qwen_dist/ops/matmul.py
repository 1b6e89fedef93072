"""Matrix products with weights that are stored out-features first, accumulated in at least float32.

Letters: B any leading dimensions, C in-features, O out-features, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_dist.ops import native
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.gpu_matmul import can_rounded_matmul, rounded_matmul
from qwen_dist.ops.weight import QuantizedWeight, Weight
from qwen_dist.sharding import active_context


def accum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the type to accumulate, normalise and rotate in: float32, or float64 when the model runs in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul(x: jax.Array, weight: Weight, dtype: DTypeLike | None = None) -> jax.Array:
    """Multiply [..., C] with a weight [O, C].

    Args:
      x: floats.
      weight: of x's dtype, or quantised.
      dtype: what the result is rounded to, once; None leaves it in `accum_dtype`.

    Returns:
      [..., O], summed in at least float32. A narrower sum would round twice where PyTorch rounds once.
    """
    return MATMUL(x, weight, jnp.dtype(accum_dtype(x.dtype) if dtype is None else dtype))


def _plain(x: jax.Array, weight: Weight, dtype: jnp.dtype) -> jax.Array:
    product = batched_matmul if isinstance(weight, jax.Array) else _by_quantized_weight
    return product(x, weight).astype(dtype)


@jax.custom_vjp
def _by_quantized_weight(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """Multiply as `batched_matmul` by a quantised weight, which has no gradient."""
    return DEQUANTIZED_MATMUL(x, weight, batched_matmul)


def _forward_by_quantized(x: jax.Array, weight: QuantizedWeight) -> tuple[jax.Array, QuantizedWeight]:
    return DEQUANTIZED_MATMUL(x, weight, _dot if x.dtype.itemsize < 4 else batched_matmul), weight


def _backward_by_quantized(weight: QuantizedWeight, gradient: jax.Array) -> tuple[jax.Array, None]:
    """Dequantise once more, so that what the backward pass keeps of the weight are its packed arrays."""
    return DEQUANTIZED_GRADIENT(gradient.astype(weight.dtype), weight).astype(weight.dtype), None


_by_quantized_weight.defvjp(_forward_by_quantized, _backward_by_quantized)


def _whole_product(x: jax.Array, weight: QuantizedWeight, multiply: Callable[..., jax.Array]) -> jax.Array:
    return multiply(x, weight.dequantize())


def _whole_gradient(gradient: jax.Array, weight: QuantizedWeight) -> jax.Array:
    # The barrier keeps the compiler from using the array of the forward pass, which would have to stay in memory.
    gradient, weight = jax.lax.optimization_barrier((gradient, weight))
    return dot(gradient, weight.dequantize(), 0)


@jax.custom_vjp
def batched_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply [*batch, ..., C] with [*batch, O, C], matrix by matrix: [*batch, ..., O] in at least float32."""
    return BATCHED_MATMUL(x, y)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return dot(x, y, y.ndim - 1)


def dot(x: jax.Array, y: jax.Array, y_dim: int) -> jax.Array:
    """Sum over the last dimension of x and one of the last two of y, in at least float32; y's others are a batch.

    Products that have a gradient are computed so. XLA CPU would merge the transposition in `matmul_weight_major` into the
    products of the gradient after it has chosen their implementation, and without AVX512 it then has none of 16-bit floats
    ("Unsupported element type for DotThunk").
    """
    batch = tuple(range(y.ndim - 2))
    dims = ((x.ndim - 1,), (y_dim,)), (batch, batch)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=accum_dtype(x.dtype))


def _forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, y) if x.dtype.itemsize < 4 else batched_matmul(x, y), (x, y)


def _backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiply in the operands' own type, as PyTorch does; jax would widen them by default, at half the speed."""
    x, y = operands
    gradient = gradient.astype(x.dtype)
    by_x, by_y = dot(gradient, y, y.ndim - 2), weight_gradient(gradient, x, y.ndim - 2)
    return by_x.astype(x.dtype), by_y.astype(y.dtype)


batched_matmul.defvjp(_forward, _backward)


# --- CPU ---


def matmul_weight_major(x: jax.Array, weight_OC: jax.Array) -> jax.Array:
    """`batched_matmul` as the weight times the rows, transposed.

    XLA CPU packs the second operand for each product, so few rows stand there rather than the weight.
    """
    dims = ((1,), (x.ndim - 1,)), ((), ())
    product = jax.lax.dot_general(weight_OC, x, dims, preferred_element_type=accum_dtype(x.dtype))
    # Without the barrier XLA swaps the operands back to save the transposition.
    return jnp.moveaxis(jax.lax.optimization_barrier(product), 0, -1)


def can_matmul_weight_major(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `matmul_weight_major` is the faster form, as measured on the shapes of a 0.5B model.

    XLA CPU multiplies 16 rows of 16-bit floats at a time, or pads to 16.
    """
    num_rows = x.size // x.shape[-1]
    if weight.ndim > 2:
        return False
    if x.dtype.itemsize >= 4:
        return 2 <= num_rows <= 64
    return num_rows in (16, 32, 64) or (num_rows < 16 and weight.shape[0] < weight.shape[1])


def _two_rows(x: jax.Array, weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """XLA CPU has no fast path for one row of 16-bit floats: pad to two."""
    return _plain(jnp.concatenate([x, jnp.zeros_like(x)], axis=0), weight, dtype)[:1]


def _is_one_narrow_row(x: jax.Array, weight: Weight, dtype: jnp.dtype) -> bool:
    return x.size == x.shape[-1] and x.dtype.itemsize < 4


# Elements of a weight that are dequantised at a time; in much smaller blocks the loop takes longer than the products.
_BLOCK = 2**21


def _product_in_blocks(x: jax.Array, weight: QuantizedWeight, multiply: Callable[..., jax.Array]) -> jax.Array:
    """Dequantise some out-features at a time.

    XLA CPU ignores barriers when it orders operations: it would make the arrays of all layers first, and keep them.
    """
    blocks, num_blocks = _blocks_of(weight)
    size = weight.shape[0] // num_blocks

    def write(index: jax.Array, product: jax.Array) -> jax.Array:
        part = multiply(x, blocks.take(index).dequantize())
        return jax.lax.dynamic_update_slice_in_dim(product, part, index * size, axis=-1)

    product = jnp.zeros((*x.shape[:-1], weight.shape[0]), accum_dtype(x.dtype))
    return jax.lax.fori_loop(0, num_blocks, write, product)


def _gradient_in_blocks(gradient: jax.Array, weight: QuantizedWeight) -> jax.Array:
    blocks, num_blocks = _blocks_of(weight)
    size = weight.shape[0] // num_blocks

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        of_block = jax.lax.dynamic_slice_in_dim(gradient, index * size, size, axis=-1)
        return total + dot(of_block, blocks.take(index).dequantize(), 0)

    total = jnp.zeros((*gradient.shape[:-1], weight.shape[1]), accum_dtype(gradient.dtype))
    return jax.lax.fori_loop(0, num_blocks, add, total)


def _blocks_of(weight: QuantizedWeight) -> tuple[QuantizedWeight, int]:
    """Return a weight as [blocks, O / blocks, C], and the number of blocks: at least two, or XLA would unroll the loop."""
    num_out, num_in = weight.shape
    wanted = max(2, num_out * num_in // _BLOCK)
    num_blocks = next(number for number in range(wanted, num_out + 1) if num_out % number == 0)
    return weight.reshape(num_blocks, num_out // num_blocks, num_in), num_blocks


def _can_take_blocks(_x: jax.Array, weight: QuantizedWeight, *_: Any) -> bool:
    """Whether there is one device: of a sharded weight XLA would gather each block."""
    context = active_context()
    return weight.ndim == 2 and weight.shape[0] > 1 and (context is None or context.mesh.size == 1)


# Matrices this narrow are low-rank factors, or the keys and values of one head.
_NARROW = 128


def weight_gradient(x: jax.Array, y: jax.Array, num_batch: int) -> jax.Array:
    """Multiply [*batch, ..., O] and [*batch, ..., C] over all rows between: [*batch, O, C] in at least float32.

    XLA CPU transposes the first operand, so the narrow one stands there: the gradient of a low-rank matrix, or of the keys,
    then takes a quarter of the time. It multiplies 16-bit floats fast only if the rows are in order, and summing over two
    dimensions makes it put them so; over one it widens both operands to float32 and takes twice the time. Other backends
    take any form equally well.
    """
    if y.shape[-1] <= _NARROW < x.shape[-1]:
        # Without the barrier XLA swaps the operands back to save the transposition.
        return jax.lax.optimization_barrier(weight_gradient(y, x, num_batch)).swapaxes(-1, -2)
    num_rows = math.prod(x.shape[num_batch:-1])
    halves = (2, num_rows // 2) if x.dtype.itemsize < 4 and num_rows % 2 == 0 else (1, num_rows)
    x, y = (z.reshape(*z.shape[:num_batch], *halves, z.shape[-1]) for z in (x, y))
    batch, rows = tuple(range(num_batch)), (num_batch, num_batch + 1)
    dims = (rows, rows), (batch, batch)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=accum_dtype(x.dtype))


_WEIGHT_MAJOR = Implementation("weight major", matmul_weight_major, can_matmul_weight_major)
_TWO_ROWS = Implementation("two rows", _two_rows, _is_one_narrow_row)
_ON_CPU = (Backend.CPU_KERNELS, Backend.CPU_KERNELS_LOCAL, Backend.CPU)
BATCHED_MATMUL = Op("batched_matmul", _dot, dict.fromkeys(_ON_CPU, (_WEIGHT_MAJOR,)))
DEQUANTIZED_MATMUL = Op(
    "matmul: dequantised weight",
    _whole_product,
    dict.fromkeys((Backend.CPU_KERNELS, Backend.CPU), (Implementation("blocks", _product_in_blocks, _can_take_blocks),)),
)
DEQUANTIZED_GRADIENT = Op(
    "matmul: dequantised weight, gradient",
    _whole_gradient,
    dict.fromkeys((Backend.CPU_KERNELS, Backend.CPU), (Implementation("blocks", _gradient_in_blocks, _can_take_blocks),)),
)
MATMUL = Op(
    "matmul",
    _plain,
    {
        Backend.CPU_KERNELS: (
            Implementation("kernel", native.matmul, native.can_matmul),
            Implementation("quantised kernel", native.quantized_matmul, native.can_quantized_matmul),
            _TWO_ROWS,
        ),
        Backend.CPU_KERNELS_LOCAL: (_TWO_ROWS,),
        Backend.CPU: (_TWO_ROWS,),
        Backend.GPU: (Implementation("rounded inside", rounded_matmul, can_rounded_matmul),),
    },
)
