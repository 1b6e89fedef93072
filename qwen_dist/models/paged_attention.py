"""Attention to the pages of a key/value cache, wherever they lie in the pool."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_dist.models import cache as kv_cache
from qwen_dist.models import native
from qwen_dist.models.layers import at_least_float32
from qwen_dist.sharding import infers_on_one_cpu


def attend_pages(
    q_BTNH: jax.Array,
    cache: kv_cache.LayerCache,
    positions_BT: jax.Array,
    pages: kv_cache.Pages,
    sliding_window: int | None = None,
) -> jax.Array:
    """`attend` to the pages of a cache, [B, T, N, H] in q's dtype: each query sees its row's pages up to its own position.

    A row's pages are looked at one by one, in groups across all rows, and what they give is added up by row with a running
    maximum (arXiv:2205.14135). The work is that of the pages that are there, whatever the longest row is.
    """
    if infers_on_one_cpu() and native.can_attend(q_BTNH, cache):
        return native.attend_pages(q_BTNH, cache, positions_BT, pages, sliding_window)
    return _attend_groups(q_BTNH, cache, positions_BT, pages, sliding_window)


@functools.partial(jax.jit, static_argnames="sliding_window")  # traced once for all layers that are alike
def _attend_groups(
    q_BTNH: jax.Array,
    cache: kv_cache.LayerCache,
    positions_BT: jax.Array,
    pages: kv_cache.Pages,
    sliding_window: int | None,
) -> jax.Array:
    parts = cache.k.shape[0]
    N, H, K = *q_BTNH.shape[2:], cache.k.shape[2]
    q_DBTKGH = q_BTNH.reshape(parts, -1, q_BTNH.shape[1], K, N // K, H)
    positions_DBT = positions_BT.reshape(parts, *q_DBTKGH.shape[1:3])
    attend_part = functools.partial(_attend_part, num_visits=jnp.asarray(pages.num_visits), sliding_window=sliding_window)
    visits = tuple(map(jnp.asarray, (pages.row_DE, pages.page_DE, pages.start_DE)))
    return jax.vmap(attend_part)(q_DBTKGH, *cache, positions_DBT, *visits).reshape(q_BTNH.shape)


def _attend_part(
    q_BTKGH: jax.Array,
    k_PKSH: jax.Array,
    v_PKSH: jax.Array,
    positions_BT: jax.Array,
    row_E: jax.Array,
    page_E: jax.Array,
    start_E: jax.Array,
    *,
    num_visits: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    S, dtype = k_PKSH.shape[2], q_BTKGH.dtype
    wide = at_least_float32(dtype)
    lowest = jnp.finfo(wide).min
    group = kv_cache.group_size(B, T)
    # All of a key head's queries are rows of one matrix: products of [T·G, H] and [S, H].
    q_BKRH = q_BTKGH.swapaxes(1, 2).reshape(B, K, T * G, H)
    batch = ((0, 1), (0, 1))

    def visit(index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest_BKR, total_BKR, mixed_BKRH = sums
        row, page, start = (jax.lax.dynamic_slice_in_dim(x, index * group, group) for x in (row_E, page_E, start_E))
        k_EKSH, v_EKSH = (x.at[page].get(mode="promise_in_bounds").view(dtype) for x in (k_PKSH, v_PKSH))
        scores_EKRS = jax.lax.dot_general(q_BKRH[row], k_EKSH, (((3,), (3,)), batch), preferred_element_type=wide)
        distance_ETS = positions_BT[row][:, :, None] - (start[:, None] + jnp.arange(S))[:, None]
        seen_ETS = distance_ETS >= 0 if sliding_window is None else (distance_ETS >= 0) & (distance_ETS < sliding_window)
        seen_EKRS = jnp.broadcast_to(seen_ETS[:, None, :, None], (group, K, T, G, S)).reshape(scores_EKRS.shape)
        scores_EKRS = jnp.where(seen_EKRS, scores_EKRS * H**-0.5, lowest)
        is_row_EB = row[:, None] == jnp.arange(B)
        of_row_EBKR = jnp.where(is_row_EB[:, :, None, None], scores_EKRS.max(axis=-1)[:, None], lowest)
        new_highest_BKR = jnp.maximum(highest_BKR, of_row_EBKR.max(axis=0))
        weights_EKRS = jnp.exp(scores_EKRS - new_highest_BKR[row][..., None])
        mixed_EKRH = jax.lax.dot_general(
            weights_EKRS.astype(dtype), v_EKSH, (((3,), (2,)), batch), preferred_element_type=wide
        )
        scale_BKR = jnp.exp(highest_BKR - new_highest_BKR)
        add_up = functools.partial(jnp.einsum, "EB,E...->B...", is_row_EB.astype(wide), precision="highest")
        total_BKR = total_BKR * scale_BKR + add_up(weights_EKRS.sum(axis=-1))
        mixed_BKRH = mixed_BKRH * scale_BKR[..., None] + add_up(mixed_EKRH)
        return new_highest_BKR, total_BKR, mixed_BKRH

    start = (jnp.full((B, K, T * G), lowest, wide), jnp.zeros((B, K, T * G), wide), jnp.zeros((B, K, T * G, H), wide))
    _, total_BKR, mixed_BKRH = jax.lax.fori_loop(0, (num_visits + group - 1) // group, visit, start)
    # A row without visits is padding: zeros.
    mixed_BKTGH = (mixed_BKRH / jnp.maximum(total_BKR, jnp.finfo(wide).tiny)[..., None]).reshape(B, K, T, G, H)
    return mixed_BKTGH.swapaxes(1, 2).astype(dtype)
