"""The key/value cache: a pool of pages a layer, each holding PAGE consecutive positions of one sequence.

A sequence owns as many pages as it has positions for, wherever they lie in the pool, so memory follows the lengths that are
there. Who owns what is the host's business (`engine.pages`); a step is told by a `Pages` for each kind of layer, which is
how far back it sees: where that is a window, the pages behind it are used again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.models.config import ModelConfig
from qwen_dist.sharding import ShardingContext

# Positions of a page. Half a page a sequence is wasted on average; smaller ones make smaller, slower products.
PAGE = 64
# Pages that are attended to at a time, at most, by rows of a single query each or of many: their scores should stay in a
# CPU's cache.
VISITS, VISITS_OF_MANY = 64, 8
# Where a page starts that nobody may see, which is after every query.
NOWHERE = np.int32(2**30)


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, [D, P, K, S, H] each, 16-bit floats as their bits.

    The batch is split over D parts (of the mesh), each with P pages of its own. XLA's CPU backend widens a whole 16-bit
    float array to float32 and back to change a few elements of it; integers are changed in place, 1,000 times faster.
    Other backends do not mind.
    """

    k: jax.Array
    v: jax.Array


Cache = tuple[LayerCache, ...]
CACHE_AXES = ("batch", "pages", "kv_heads", "kv_length", "head_dim")


class Pages(NamedTuple):
    """Where the tokens of a step go and what they look at in layers of one kind, int32.

    write_BT: the page of each token, counted in its part of the pool; negative for tokens that are not kept. The slot in
      it is the token's position modulo PAGE.
    row_DE, page_DE, start_DE: each part's visits: row `row` of the part's B / D rows looks at page `page`, whose first slot
      holds position `start`. E is a multiple of VISITS; visits that are none start NOWHERE.
    num_visits: how many of E to make, at least those of every part.
    """

    write_BT: jax.Array | np.ndarray
    row_DE: jax.Array | np.ndarray
    page_DE: jax.Array | np.ndarray
    start_DE: jax.Array | np.ndarray
    num_visits: jax.Array | np.ndarray


def group_size(num_rows: int, num_queries: int) -> int:
    """How many visits of so many rows with so many queries each are made at a time; it divides VISITS."""
    return min(VISITS, 1 << (4 * num_rows - 1).bit_length()) if num_queries == 1 else VISITS_OF_MANY


def num_pages(num_positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-num_positions // PAGE)


def page_bytes(config: ModelConfig, sharding_ctx: ShardingContext, dtype: DTypeLike) -> int:
    """Bytes that a page takes on each device that has a part of it, in all layers."""
    shape = (sharding_ctx.batch_multiple(), 1, config.num_key_value_heads, PAGE, config.head_dim)
    on_device = sharding_ctx.activation("cache", shape, CACHE_AXES).shard_shape(shape)
    return 2 * math.prod(on_device) * jnp.dtype(dtype).itemsize * len(config.layers)


def empty(config: ModelConfig, parts: int, num_pages: Sequence[int], dtype: DTypeLike) -> Cache:
    """A cache of zeros for a model that computes in `dtype`: `num_pages` of each of `config.windows` in each of `parts`."""

    def layer(pages: int) -> LayerCache:
        zeros = jnp.zeros((parts, pages, config.num_key_value_heads, PAGE, config.head_dim), _stored_dtype(dtype))
        return LayerCache(zeros, zeros)

    return tuple(map(layer, _by_layer(config, num_pages)))


def resized(config: ModelConfig, cache: Cache, num_pages: Sequence[int]) -> Cache:
    """The cache with so many more pages that each part has `num_pages` of each of `config.windows`."""

    def layer(old: LayerCache, pages: int) -> LayerCache:
        widths = [(0, 0), (0, pages - old.k.shape[1]), (0, 0), (0, 0), (0, 0)]
        return LayerCache(*(jnp.pad(x, widths) for x in old))

    return tuple(map(layer, cache, _by_layer(config, num_pages)))


def _by_layer(config: ModelConfig, num_pages: Sequence[int]) -> list[int]:
    by_window = dict(zip(config.windows, num_pages, strict=True))
    return [by_window[layer.sliding_window] for layer in config.layers]


def in_order(config: ModelConfig, positions_BT: jax.Array, parts: int, pages_per_row: int) -> tuple[Pages, ...]:
    """Pages for rows that each own `pages_per_row` of every kind, one row after the other: the plainest allocation."""
    num_rows, rows = len(positions_BT), len(positions_BT) // parts
    first_B1 = (jnp.arange(num_rows) % rows * pages_per_row)[:, None]
    num_visits = rows * pages_per_row
    missing = -num_visits % VISITS
    page_E = jnp.pad(jnp.arange(num_visits), (0, missing))
    start_E = jnp.pad(page_E[:num_visits] % pages_per_row * PAGE, (0, missing), constant_values=NOWHERE)
    row_DE, page_DE, start_DE = (jnp.tile(x, (parts, 1)) for x in (page_E // pages_per_row, page_E, start_E))
    write_BT = jnp.where(positions_BT < 0, -1, first_B1 + positions_BT // PAGE)
    return (Pages(write_BT, row_DE, page_DE, start_DE, jnp.int32(num_visits)),) * len(config.windows)


def write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, pages: Pages) -> LayerCache:
    """Put the keys and values of each token into its page."""
    parts, total = cache.k.shape[:2]
    page_DX = jnp.where(pages.write_BT < 0, total, pages.write_BT).reshape(parts, -1)
    slot_DX = (positions_BT % PAGE).reshape(parts, -1)

    def put(pool_PKSH: jax.Array, new_XKH: jax.Array, page_X: jax.Array, slot_X: jax.Array) -> jax.Array:
        return pool_PKSH.at[page_X, :, slot_X].set(new_XKH, mode="drop")

    def put_all(pool: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_DXKH = new_BTKH.reshape(parts, -1, *new_BTKH.shape[2:]).view(pool.dtype)
        return jax.vmap(put)(pool, new_DXKH, page_DX, slot_DX)

    return LayerCache(put_all(cache.k, k_BTKH), put_all(cache.v, v_BTKH))


def _stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)
