"""Matrix products on a GPU whose result is rounded to 16 bits by the kernel that multiplies.

The kernel sums in float32 as the plain form does. Rounded afterwards, each result of training and prefill would be
written to memory in float32 and read again.

Letters: C in-features, O out-features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.ops.weight import Weight


def can_rounded_matmul(x: jax.Array, weight: Weight, dtype: jnp.dtype) -> bool:
    """Whether operands and result are of one 16-bit type."""
    is_array = isinstance(weight, jax.Array | jax.ShapeDtypeStruct)
    return is_array and x.dtype == weight.dtype == dtype and x.dtype.itemsize == 2


def rounded_matmul(x: jax.Array, weight_OC: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute `matmul.matmul` of the same arguments."""
    return _multiply(x, weight_OC)


@jax.custom_vjp
def _multiply(x: jax.Array, weight_OC: jax.Array) -> jax.Array:
    return _dot(x, weight_OC, (x.ndim - 1,), (1,))


def _backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OC = operands
    rows = tuple(range(x.ndim - 1))
    return _dot(gradient, weight_OC, (x.ndim - 1,), (0,)), _dot(gradient, x, rows, rows)


_multiply.defvjp(lambda x, weight_OC: (_multiply(x, weight_OC), (x, weight_OC)), _backward)


def _dot(x: jax.Array, y: jax.Array, x_dims: tuple[int, ...], y_dims: tuple[int, ...]) -> Any:
    return jax.lax.dot_general(x, y, ((x_dims, y_dims), ((), ())), preferred_element_type=x.dtype)
