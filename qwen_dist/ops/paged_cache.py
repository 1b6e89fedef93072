"""Keys and values in pages: a pool of pages a layer, each with PAGE consecutive positions of one sequence.

A sequence has as many pages as its positions need, anywhere in the pool, so memory follows the actual lengths. The host
decides which pages belong to whom (`engine.page_allocator`); a step brings `PageIndices` for each cache group.

Letters: D data-parallel shards, P pages of a shard's pool, K key/value heads, S positions of a page, H head_dim, B rows,
T length, X tokens of a shard, E entries (a row looking at a page).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.sharding import LocalShard, active_context, constrain, shard_map_op

# Positions of a page. Half a page a sequence is wasted on average; smaller pages make smaller, slower products.
PAGE = 64
# Channels with one scale, of keys and values in 8 bits.
SCALED = 16
# Pages that attention reads at a time, at most, for rows of one query and of many: their scores fit into a CPU's cache.
MAX_ENTRIES, MAX_ENTRIES_OF_MANY = 64, 8
# The first position of a page that no query may see: it is after every query.
NOWHERE = np.int32(2**30)


class PagedState(NamedTuple):
    """The rotated keys and the values of one layer, [D, P, K, S, H] each; floats of 16 and 8 bits are stored as their bits.

    The batch is split over D data-parallel shards, each with P pages. To change a few elements of a 16-bit float array, XLA
    CPU widens all of it to float32 and back; it changes integers in place, 1,000 times faster. Other backends do not mind.

    Values of 8 bits have bfloat16 scales, [D, P, K, S, groups of SCALED channels]. One scale for each page would have to
    change, and all of the page with it, with each token that has a larger value. One for each head is not enough:
    Qwen2's keys have a few channels that are far larger than the others, and would make these coarse.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class PageIndices(NamedTuple):
    """Where the tokens of a step go, and which pages each row reads, in the layers of one cache group; int32.

    Attributes:
      write_BN, first_page_B: the pages that a row writes to, in its shard's pool: column n has the row's page number
        first_page + n, which holds the positions from (first_page + n) · PAGE on.
      row_DE, page_DE, start_DE: the entries of each shard: row `row` of the shard's B / D rows reads page `page`, whose
        first position is `start`. E is a multiple of MAX_ENTRIES; entries that fill it up start at NOWHERE.
      num_entries: how many of E to process: the most that any shard has.
    """

    write_BN: jax.Array | np.ndarray
    first_page_B: jax.Array | np.ndarray
    row_DE: jax.Array | np.ndarray
    page_DE: jax.Array | np.ndarray
    start_DE: jax.Array | np.ndarray
    num_entries: jax.Array | np.ndarray


def entries_at_a_time(num_rows: int, num_queries: int) -> int:
    """Return how many entries attention processes together for rows with this many queries; it divides MAX_ENTRIES."""
    return min(MAX_ENTRIES, 1 << (4 * num_rows - 1).bit_length()) if num_queries == 1 else MAX_ENTRIES_OF_MANY


def pages_for(num_positions: int) -> int:
    """Return how many pages this many positions take."""
    return -(-num_positions // PAGE)


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the type in which keys and values of this type are stored: see `PagedState`."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(dtype)
    return jnp.dtype({1: jnp.uint8, 2: jnp.uint16}.get(jnp.dtype(dtype).itemsize, dtype))


def scales_for(head_dim: int) -> int:
    """Return how many scales a key or a value in 8 bits has."""
    return head_dim // math.gcd(head_dim, SCALED)


def quantize(x_BTKH: jax.Array, stored: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return keys or values in 8 bits, int8 or the bits of float8_e4m3fn, and their scales as they are stored.

    The scale makes the largest |value| of a group the largest number of the type; the others are rounded to the nearest.
    """
    groups = x_BTKH.astype(jnp.float32).reshape(*x_BTKH.shape[:-1], scales_for(x_BTKH.shape[-1]), -1)
    limit = 127.0 if stored == jnp.int8 else 448.0
    largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    scale = (largest / limit).astype(jnp.bfloat16)
    scale = jnp.where(scale == 0, 1, scale)  # of zeros, or of numbers too small for the type
    scaled = (groups / scale.astype(jnp.float32)).clip(-limit, limit).reshape(x_BTKH.shape)
    values = jnp.round(scaled).astype(jnp.int8) if stored == jnp.int8 else scaled.astype(jnp.float8_e4m3fn).view(jnp.uint8)
    return values, scale[..., 0].view(jnp.uint16)


def read_pages(pool_PKSH: jax.Array, scale_PKSG: jax.Array | None, page_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the keys or values of pages [E, K, S, H] in the type that attention computes in."""
    stored = pool_PKSH.at[page_E].get(mode="promise_in_bounds")
    if scale_PKSG is None:
        return stored.view(dtype)
    values = stored if stored.dtype == jnp.int8 else stored.view(jnp.float8_e4m3fn)
    scale = scale_PKSG.at[page_E].get(mode="promise_in_bounds").view(jnp.bfloat16).astype(jnp.float32)
    groups = values.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    return groups.astype(dtype).reshape(values.shape)


def write(
    state: PagedState, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, page_BT: jax.Array
) -> PagedState:
    """Put the key and the value of each token into its page, at its position modulo PAGE; drop tokens of negative pages."""
    new: tuple[jax.Array, ...] = k_BTKH, v_BTKH
    if state.k_scale is not None:
        (k, k_scale), (v, v_scale) = quantize(k_BTKH, state.k.dtype), quantize(v_BTKH, state.v.dtype)
        new = (k, v, k_scale, v_scale)
    num_shards, num_pages = state.k.shape[:2]
    page_DX = jnp.where(page_BT < 0, num_pages, page_BT).reshape(num_shards, -1)
    offset_DX = (positions_BT % PAGE).reshape(num_shards, -1)

    def put_all(pool: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_DXKH = new_BTKH.reshape(num_shards, -1, *new_BTKH.shape[2:]).view(pool.dtype)
        return WRITE(pool, new_DXKH, page_DX, offset_DX)

    # Otherwise XLA shards them as attention reads them, and all-gathers them after the step.
    pools = zip(jax.tree.leaves(state), new, strict=True)
    return PagedState(*(constrain(put_all(pool, one), *_POOL) for pool, one in pools))


def write_plain(pool_DPKSH: jax.Array, new_DXKH: jax.Array, page_DX: jax.Array, offset_DX: jax.Array) -> jax.Array:
    """Return the pool with new keys or values in it, those of pages that it does not have left out."""

    def put(pool_PKSH: jax.Array, new_XKH: jax.Array, page_X: jax.Array, offset_X: jax.Array) -> jax.Array:
        return pool_PKSH.at[page_X, :, offset_X].set(new_XKH, mode="drop")

    return jax.vmap(put)(pool_DPKSH, new_DXKH, page_DX, offset_DX)


def write_rows(pool_DPKSH: jax.Array, new_DXKH: jax.Array, page_DX: jax.Array, offset_DX: jax.Array) -> jax.Array:
    """Write each head's numbers as a row of a matrix, which is what the pool is in memory.

    To write the heads of a position at once, XLA TPU gives the pool another layout: it copies all of it there and back. XLA
    GPU transposes it for the same reason.
    """

    def put(_: LocalShard, pool_DPKSH: jax.Array, new_DXKH: jax.Array, page_DX: jax.Array, offset_DX: jax.Array) -> Any:
        K, S, H = pool_DPKSH.shape[2:]
        row_XK = (page_DX[0, :, None] * K + jnp.arange(K)) * S + offset_DX[0, :, None]
        return (pool_DPKSH.reshape(-1, H).at[row_XK].set(new_DXKH[0], mode="drop").reshape(pool_DPKSH.shape),)

    axes = _POOL, ("batch", "slots", "kv_heads", "head_dim"), ("batch", "slots"), ("batch", "slots")
    (pool_DPKSH,) = shard_map_op(put, (pool_DPKSH, new_DXKH, page_DX, offset_DX), axes, (_POOL,))
    return pool_DPKSH


def can_write_rows(pool_DPKSH: jax.Array, new_DXKH: jax.Array, page_DX: jax.Array, offset_DX: jax.Array) -> bool:
    """Whether each device has one shard of the batch."""
    return is_shard_by_shard(pool_DPKSH)


def is_shard_by_shard(pool_DPKSH: jax.Array) -> bool:
    """Return whether the active rules put each data-parallel shard of a pool on different devices."""
    context = active_context()
    return len(pool_DPKSH) == (1 if context is None else context.num_shards("batch"))


_POOL = ("batch", "pages", "kv_heads", "kv_length", "head_dim")
_ROWS = (Implementation("rows", write_rows, can_write_rows),)
WRITE = Op("paged cache: write", write_plain, {Backend.GPU: _ROWS, Backend.TPU: _ROWS})
