"""Rotation of queries and keys by their positions' angles (arXiv:2104.09864).

Letters: B batch, T length, N heads, H head_dim, A pairs: half of H, or of the part that is rotated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.ops import native
from qwen_dist.ops.dispatch import Backend, Implementation, Op


def rotate(x_BTNH: jax.Array, cos_BTA: jax.Array, sin_BTA: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + A) of each head by their angles, in the precision of cos and sin; returns x's dtype.

    Of a head with more than 2 A channels the others stay as they are.
    """
    num_rotated = 2 * cos_BTA.shape[-1]
    if num_rotated == x_BTNH.shape[-1]:
        return ROTATE(x_BTNH, cos_BTA, sin_BTA)
    rotated, kept = jnp.split(x_BTNH, [num_rotated], axis=-1)
    return jnp.concatenate([ROTATE(rotated, cos_BTA, sin_BTA), kept], axis=-1)


def rotate_plain(x_BTNH: jax.Array, cos_BTA: jax.Array, sin_BTA: jax.Array) -> jax.Array:
    cos, sin = cos_BTA[:, :, None, :], sin_BTA[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


ROTATE = Op("rotate", rotate_plain, {Backend.CPU_KERNELS: (Implementation("kernel", native.rotate, native.can_rotate),)})
