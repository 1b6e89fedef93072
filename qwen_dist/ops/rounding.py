"""Rounding that a compiler keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# The smallest normal number of float16.
_FLOAT16_TINY = 2.0**-14


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round float32 to bfloat16 or float16 and keep it in float32; for other dtypes return x.

    A compiler that computes with bfloat16 in float32 may leave out a conversion to bfloat16 and back.
    """
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, 8, 7)
    if dtype == jnp.float16:
        # reduce_precision makes numbers below the normal ones 0. They are not rounded: the products of quantised values and
        # their scales, whole numbers times the scale, are exact there.
        return jnp.where(jnp.abs(x) < _FLOAT16_TINY, x, jax.lax.reduce_precision(x, 5, 10))
    return x
