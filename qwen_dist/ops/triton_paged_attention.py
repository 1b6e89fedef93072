"""Attention to pages on a GPU: one Pallas kernel for Triton, for prefill and decode alike.

A program takes queries of one key head of one row and a part of the row's pages, and keeps a running maximum
(arXiv:2205.14135). Where few rows would leave multiprocessors idle, a row's pages are several parts, which are added up
afterwards.

Letters: B rows, T queries of a row, N query heads, K key/value heads, G = N / K, H head_dim, S positions of a page, P pages
of the pool, D data-parallel shards (1 on each device), E entries (a row reading a page), R = T·G, C parts of a row.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.ops import gpu
from qwen_dist.ops.paged_cache import NOWHERE, PAGE, PagedState, PageIndices, is_shard_by_shard
from qwen_dist.sharding import LocalShard, active_num_shards, shard_map_op

# Queries of a program: at least what a tensor core multiplies, at most what its registers hold.
MIN_QUERIES, MAX_QUERIES = 16, 64
# A few programs for each multiprocessor of a large GPU, if parts of rows can make them: one alone waits for its memory.
NUM_PROGRAMS, MAX_PARTS = 512, 32
HEAD_DIMS = (64, 128, 256)
# The exponent of a key that a query does not see; finite, so that the difference of two is a number.
_LOWEST = -1e30


def can_triton_paged_attention(
    q_BTNH: jax.Array, state: PagedState, positions_BT: jax.Array, pages: PageIndices, sliding_window: int | None
) -> bool:
    """Whether the kernel takes these: it rounds wider floats, and each device needs the keys of its queries' heads."""
    N, H = q_BTNH.shape[2:]
    is_form = q_BTNH.dtype.itemsize == 2 and H in HEAD_DIMS and active_num_shards("q_heads", N) <= state.k.shape[2]
    return is_form and state.k_scale is None and is_shard_by_shard(state.k) and gpu.gpu_features().can_run_triton


def triton_paged_attention(
    q_BTNH: jax.Array,
    state: PagedState,
    positions_BT: jax.Array,
    pages: PageIndices,
    sliding_window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute `paged_attention.paged_attention` of the same arguments; `interpret` runs without a GPU, slowly."""
    queries, pool = ("batch", "length", "q_heads", "head_dim"), ("batch", "pages", "kv_heads", "kv_length", "head_dim")
    entries = tuple(jnp.asarray(x) for x in (pages.row_DE, pages.page_DE, pages.start_DE))
    axes = queries, pool, pool, ("batch", "length"), *(("batch", "pages"),) * 3
    body = functools.partial(_local_attention, sliding_window=sliding_window, interpret=interpret)
    (mixed_BTNH,) = shard_map_op(body, (q_BTNH, state.k, state.v, positions_BT, *entries), axes, (queries,))
    return mixed_BTNH


def _local_attention(
    _: LocalShard,
    q_BTNH: jax.Array,
    k_DPKSH: jax.Array,
    v_DPKSH: jax.Array,
    positions_BT: jax.Array,
    row_DE: jax.Array,
    page_DE: jax.Array,
    start_DE: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> tuple[jax.Array]:
    """Attend from one device's rows and heads."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (B, T, N, H), K = q_BTNH.shape, k_DPKSH.shape[2]
    G, R = N // K, T * (N // K)
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, R, H)
    block = max(MIN_QUERIES, min(MAX_QUERIES, pl.next_power_of_2(R)))
    num_blocks = pl.cdiv(R, block)
    C = max(1, min(MAX_PARTS, NUM_PROGRAMS // (B * K * num_blocks)))
    sums = jax.ShapeDtypeStruct((C, B, K, R), jnp.float32)
    kernel = functools.partial(_kernel, block=block, num_parts=C, dtype=q_BTNH.dtype, sliding_window=sliding_window)
    attend = pl.pallas_call(
        kernel,
        grid=(num_blocks, B * K, C),
        out_shape=(sums, sums, jax.ShapeDtypeStruct((C, B, K, R, H), jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )
    rows = in_rows(row_DE[0], page_DE[0], start_DE[0], B)
    highest_CBKR, total_CBKR, mixed_CBKRH = attend(q_BKRH, k_DPKSH, v_DPKSH, jnp.repeat(positions_BT, G, axis=1), *rows)
    scale_CBKR = jnp.exp2(highest_CBKR - highest_CBKR.max(axis=0))
    # A row without entries is padding: zeros.
    total_BKR = jnp.maximum((total_CBKR * scale_CBKR).sum(axis=0), jnp.finfo(jnp.float32).tiny)
    mixed_BKRH = (mixed_CBKRH * scale_CBKR[..., None]).sum(axis=0) / total_BKR[..., None]
    return (mixed_BKRH.reshape(B, K, T, G, H).swapaxes(1, 2).reshape(B, T, N, H).astype(q_BTNH.dtype),)


def in_rows(
    row_E: jax.Array, page_E: jax.Array, start_E: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the pages row by row, and of each row where they start, how many they are, and the position of the first.

    Those of a row are consecutive pages of its sequence, so none has to be searched.
    """
    is_entry_E = start_E < NOWHERE
    to_E = jnp.where(is_entry_E, row_E, num_rows)
    count_B = jnp.zeros(num_rows, jnp.int32).at[to_E].add(1, mode="drop")
    start_B = jnp.full(num_rows, NOWHERE, jnp.int32).at[to_E].min(start_E, mode="drop")
    first_B = jnp.cumsum(count_B) - count_B
    place_E = first_B[row_E] + (start_E - start_B[row_E]) // PAGE
    in_order_E = jnp.zeros_like(page_E).at[jnp.where(is_entry_E, place_E, len(page_E))].set(page_E, mode="drop")
    return in_order_E, first_B, count_B, start_B


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    page_ref: Any,
    first_ref: Any,
    count_ref: Any,
    start_ref: Any,
    highest_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *,
    block: int,
    num_parts: int,
    dtype: Any,
    sliding_window: int | None,
) -> None:
    """Attend from a block of the queries of a row to a part of its pages."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    K, (R, H), S = k_ref.shape[2], q_ref.shape[2:], k_ref.shape[3]
    row, head, part = jax.lax.div(pl.program_id(1), K), jax.lax.rem(pl.program_id(1), K), pl.program_id(2)
    queries = pl.ds(pl.program_id(0) * block, block)
    is_query = pl.program_id(0) * block + jnp.arange(block) < R
    q = triton.load(q_ref.at[row, head, queries, :], mask=is_query[:, None], other=0.0)
    position = triton.load(positions_ref.at[row, queries], mask=is_query, other=-1)
    first, count, start = first_ref[row], count_ref[row], start_ref[row]
    of_part = jax.lax.div(count + num_parts - 1, num_parts)
    begin = jnp.minimum(part * of_part, count)

    def attend(index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, mixed = sums
        page = page_ref[first + index]
        # The pool has bits, which are read as they are: outside of the kernel XLA might copy the pool to convert it.
        k, v = (jax.lax.bitcast_convert_type(ref[0, page, head], dtype) for ref in (k_ref, v_ref))
        scores = _dot(q, k, 1) * (H**-0.5 * math.log2(math.e))
        distance = position[:, None] - (start + index * S + jnp.arange(S))[None, :]
        is_seen = distance >= 0
        if sliding_window is not None:
            is_seen &= distance < sliding_window
        scores = jnp.where(is_seen, scores, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(axis=1))
        weights = jnp.exp2(scores - new_highest[:, None])
        scale = jnp.exp2(highest - new_highest)
        mixed = mixed * scale[:, None] + _dot(weights.astype(dtype), v, 0)
        return new_highest, total * scale + weights.sum(axis=1), mixed

    nothing = jnp.full(block, _LOWEST, jnp.float32), jnp.zeros(block, jnp.float32), jnp.zeros((block, H), jnp.float32)
    highest, total, mixed = jax.lax.fori_loop(begin, jnp.minimum(begin + of_part, count), attend, nothing)
    triton.store(highest_ref.at[part, row, head, queries], highest, mask=is_query)
    triton.store(total_ref.at[part, row, head, queries], total, mask=is_query)
    triton.store(mixed_ref.at[part, row, head, queries, :], mixed, mask=is_query[:, None])


def _dot(x: jax.Array, y: jax.Array, dim: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((1,), (dim,)), ((), ())), preferred_element_type=jnp.float32)
