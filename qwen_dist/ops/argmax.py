"""The index of the largest element of each row: the most likely token.

Letters: B rows, V vocab, X blocks of a row, Y elements of a block, W words of 32 bits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.sharding import constrain

# The blocks of a row in which the maximum is searched, at most; published vocabularies divide by it.
MAX_BLOCKS = 128
# The bits of a word, one for each element that may be allowed.
WORD = 32


def argmax(x_BV: jax.Array) -> jax.Array:
    """Return the index of the largest element of each row, the first of equals, int32 [B]."""
    return ARGMAX(x_BV)


def argmax_plain(x_BV: jax.Array) -> jax.Array:
    return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)


def argmax_in_blocks(x_BV: jax.Array) -> jax.Array:
    """Find the block with the largest element, then the element in it.

    XLA CPU computes a maximum many times faster than its index, so the index is computed for few numbers only.
    """
    num_rows, size = x_BV.shape
    num_blocks = math.gcd(size, MAX_BLOCKS)
    blocks_BXY = x_BV.reshape(num_rows, num_blocks, -1)
    block_B = jnp.argmax(blocks_BXY.max(axis=2), axis=1)
    inside_B = jnp.argmax(jnp.take_along_axis(blocks_BXY, block_B[:, None, None], axis=1)[:, 0], axis=1)
    return (block_B * (size // num_blocks) + inside_B).astype(jnp.int32)


def allowed_argmax(x_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Return the index of the largest element of each row among those allowed, the first of equals, int32 [B].

    Args:
      x_BV: floats above -inf.
      allowed_BW: uint32, a bit for each element, the lowest of each word first. At least one of a row is set.
    """
    return ALLOWED_ARGMAX(x_BV, allowed_BW)


def allowed_argmax_plain(x_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    return argmax(jnp.where(unpack_allowed(allowed_BW, x_BV.shape[1]), x_BV, -jnp.inf))


def allowed_argmax_by_row(x_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Search once more in the rows whose largest element is not allowed, which are few if the model keeps to the form.

    The plain form writes all rows to memory once more, and reads them again.
    """
    best_B = argmax(x_BV)
    words_B = jnp.take_along_axis(allowed_BW, best_B[:, None] // WORD, axis=1)[:, 0]
    is_allowed_B = (words_B >> (best_B % WORD).astype(jnp.uint32)) & 1 != 0
    others_first_B = jnp.argsort(is_allowed_B, stable=True)

    def search(index: jax.Array, best_B: jax.Array) -> jax.Array:
        row = others_first_B[index]
        x_1V, allowed_1W = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (x_BV, allowed_BW))
        return best_B.at[row].set(allowed_argmax_plain(x_1V, allowed_1W)[0])

    return jax.lax.fori_loop(0, (~is_allowed_B).sum(), search, best_B)


def unpack_allowed(allowed_BW: jax.Array, size: int) -> jax.Array:
    """Return the bits of words, the lowest of each first, as bool [B, V]."""
    bits_BWN = (allowed_BW[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return constrain((bits_BWN != 0).reshape(len(allowed_BW), -1)[:, :size], "batch", "vocab")


# Every backend uses it; only on CPUs has the difference been measured.
_BLOCKS = (Implementation("blocks", argmax_in_blocks),)
ARGMAX = Op("argmax", argmax_plain, dict.fromkeys(Backend, _BLOCKS))
_BY_ROW = (Implementation("by row", allowed_argmax_by_row),)
ALLOWED_ARGMAX = Op("allowed_argmax", allowed_argmax_plain, {Backend.CPU_KERNELS: _BY_ROW})
