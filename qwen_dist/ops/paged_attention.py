"""Attention to the pages of a key/value cache, wherever they are in the pool.

Letters: B rows of a shard, T queries of a row, N query heads, K key/value heads, G = N / K, H head_dim, S positions of a
page, P pages of the pool, D data-parallel shards, E entries (a row reading a page), R = T·G.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_dist.ops import native
from qwen_dist.ops.attention import is_visible
from qwen_dist.ops.cost import F32_BYTES, LayerCost, Passes, Step, uncounted_share
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.ops.paged_cache import PAGE, PagedState, PageIndices, entries_at_a_time, read_pages
from qwen_dist.ops.triton_paged_attention import can_triton_paged_attention, triton_paged_attention


def paged_attention(
    q_BTNH: jax.Array,
    state: PagedState,
    positions_BT: jax.Array,
    pages: PageIndices,
    sliding_window: int | None = None,
) -> jax.Array:
    """Compute `attention.attention` over cached keys: each query sees its row's pages up to its own position.

    The work is proportional to the pages that rows have, whatever the longest row is.

    Args:
      q_BTNH: queries of all D·B rows.
      state: keys and values of one layer, with those of these tokens already written.
      positions_BT: of the queries; negative for padding.
      pages: which pages each row reads.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    return PAGED_ATTENTION(q_BTNH, state, positions_BT, pages, sliding_window)


@functools.partial(jax.jit, static_argnames="sliding_window")  # traced once for all layers that are alike
def paged_attention_in_groups(
    q_BTNH: jax.Array,
    state: PagedState,
    positions_BT: jax.Array,
    pages: PageIndices,
    sliding_window: int | None,
) -> jax.Array:
    """Read pages in groups across all rows, and add up what they give by row with a running maximum (arXiv:2205.14135)."""
    num_shards = state.k.shape[0]
    N, H, K = *q_BTNH.shape[2:], state.k.shape[2]
    q_DBTKGH = q_BTNH.reshape(num_shards, -1, q_BTNH.shape[1], K, N // K, H)
    positions_DBT = positions_BT.reshape(num_shards, *q_DBTKGH.shape[1:3])
    attend = functools.partial(_attend_shard, num_entries=jnp.asarray(pages.num_entries), sliding_window=sliding_window)
    entries = tuple(map(jnp.asarray, (pages.row_DE, pages.page_DE, pages.start_DE)))
    return jax.vmap(attend)(q_DBTKGH, state, positions_DBT, *entries).reshape(q_BTNH.shape)


def _attend_shard(
    q_BTKGH: jax.Array,
    state: PagedState,
    positions_BT: jax.Array,
    row_E: jax.Array,
    page_E: jax.Array,
    start_E: jax.Array,
    *,
    num_entries: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    S, dtype = state.k.shape[2], q_BTKGH.dtype
    wide = accum_dtype(dtype)
    lowest = jnp.finfo(wide).min
    group = entries_at_a_time(B, T)
    # All queries of a key head are rows of one matrix: products of [T·G, H] and [S, H].
    q_BKRH = q_BTKGH.swapaxes(1, 2).reshape(B, K, T * G, H)
    batch = ((0, 1), (0, 1))

    def attend_group(
        index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest_BKR, total_BKR, mixed_BKRH = sums
        row, page, start = (jax.lax.dynamic_slice_in_dim(x, index * group, group) for x in (row_E, page_E, start_E))
        k_EKSH = read_pages(state.k, state.k_scale, page, dtype)
        v_EKSH = read_pages(state.v, state.v_scale, page, dtype)
        scores_EKRS = jax.lax.dot_general(q_BKRH[row], k_EKSH, (((3,), (3,)), batch), preferred_element_type=wide)
        distance_ETS = positions_BT[row][:, :, None] - (start[:, None] + jnp.arange(S))[:, None]
        seen_ETS = is_visible(distance_ETS, sliding_window)
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
    _, total_BKR, mixed_BKRH = jax.lax.fori_loop(0, (num_entries + group - 1) // group, attend_group, start)
    # A row without entries is padding: zeros.
    mixed_BKTGH = (mixed_BKRH / jnp.maximum(total_BKR, jnp.finfo(wide).tiny)[..., None]).reshape(B, K, T, G, H)
    return mixed_BKTGH.swapaxes(1, 2).astype(dtype)


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention_in_groups,
    {
        Backend.CPU_KERNELS: (Implementation("kernel", native.paged_attention, native.can_paged_attention),),
        Backend.GPU: (Implementation("triton", triton_paged_attention, can_triton_paged_attention),),
    },
)


def paged_attention_cost(step: Step, num_heads: int, num_kv_heads: int, head_dim: int) -> LayerCost:
    """Return the cost of attention in inference: the loop over groups of pages holds one group at a time."""
    num_rows, T = step.size(batch=step.num_rows), step.num_outputs
    group = entries_at_a_time(num_rows, T)
    products = step.outputs(q_heads=num_heads) * 4 * head_dim * step.num_keys
    uncounted = uncounted_share(num_rows * step.num_pages / group)
    keys = 2 * group * step.size(kv_heads=num_kv_heads, kv_length=PAGE, head_dim=head_dim) * step.itemsize
    # The scores of a group, and their softmax.
    scores = 2 * group * step.size(length=T, q_heads=num_heads, kv_length=PAGE) * F32_BYTES
    queries = step.outputs(q_heads=num_heads, head_dim=head_dim) * step.itemsize
    return LayerCost(
        flops=Passes(products),
        uncounted_flops=Passes(uncounted * products),
        uncounted_state=uncounted,
        workspace_bytes=queries + keys + scores,
    )
