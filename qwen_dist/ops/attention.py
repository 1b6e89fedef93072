"""Attention without a cache: each query of a row sees the keys of the same row up to its own.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim, R = T·G, C devices that a row
is split over (context parallelism).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.capture import scope, tap
from qwen_dist.ops.cost import F32_BYTES, NOTHING, LayerCost, Passes, Step
from qwen_dist.ops.cudnn_attention import can_cudnn_attention, cudnn_attention
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype, batched_matmul, dot, weight_gradient
from qwen_dist.ops.splash_attention import LANES, can_splash_attention, splash_attention
from qwen_dist.ops.triton_attention import can_triton_attention, triton_attention
from qwen_dist.sharding import active_num_shards, constrain

# Queries are taken in blocks: the scores of a block stay in a CPU's cache, and keys after the block are not read. Compile
# time grows with the number of blocks; with eight, one key in nine is read needlessly.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 128, 8


def attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(q·k / √H) v over the keys that each query may see (arXiv:1706.03762, grouped as arXiv:2305.13245).

    Args:
      q_BTNH, k_BKSH, v_BKSH: of one dtype. Queries and keys are of the same tokens in order: query t needs no key after the
        t-th, whatever its position.
      positions_BT: a query at position p sees the keys at positions 0 … p, or the last `sliding_window` of them. A negative
        position is padding, which nothing sees.
      segments_BT: with it, a query sees only the keys of its own segment.

    Returns:
      [B, T, N, H] in q's dtype; the softmax is computed in at least float32.
    """
    return ATTENTION(q_BTNH, k_BKSH, v_BKSH, positions_BT, sliding_window, segments_BT)


def attention_in_blocks(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    T = q_BTNH.shape[1]
    C = active_num_shards("length", T)
    # With the length split over C devices each has its own queries and all keys. A block then has as many queries of each
    # device, of which the last device's see the most.
    k_BKSH = constrain(k_BKSH, "batch", "kv_heads", "kv_length", "head_dim")
    v_BKSH = constrain(v_BKSH, "batch", "kv_heads", "kv_length", "head_dim")
    q_BCTNH, positions_BCT = split_length(q_BTNH, C), split_length(positions_BT, C)
    outputs = []
    size = query_block(T // C)
    for start in range(0, T // C, size):
        block = slice(start, min(start + size, T // C))
        end = T - T // C + block.stop
        seen_BTS = visible(merge_length(positions_BCT[:, :, block]), positions_BT[:, :end], sliding_window)
        if segments_BT is not None:
            segments_BCT = split_length(segments_BT, C)
            seen_BTS &= merge_length(segments_BCT[:, :, block])[:, :, None] == segments_BT[:, None, :end]
        with scope(f"queries_{start}"):
            q_block = merge_length(q_BCTNH[:, :, block])
            mixed_BTNH = _attend_block(q_block, k_BKSH[:, :, :end], v_BKSH[:, :, :end], seen_BTS)
            outputs.append(split_length(mixed_BTNH, C))
    return merge_length(outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2))


def query_block(num_queries: int) -> int:
    """Return how many queries `attention_in_blocks` takes at a time."""
    return min(num_queries, max(QUERY_BLOCK, -(-num_queries // MAX_QUERY_BLOCKS)))


def split_length(x_BT: jax.Array, num_shards: int) -> jax.Array:
    """[B, T, …] → [B, C, T/C, …]."""
    B, T, *rest = x_BT.shape
    return x_BT.reshape(B, num_shards, T // num_shards, *rest)


def merge_length(x_BCT: jax.Array) -> jax.Array:
    """[B, C, T, …] → [B, C·T, …]."""
    B, C, T, *rest = x_BCT.shape
    return x_BCT.reshape(B, C * T, *rest)


def visible(q_positions_BT: jax.Array, kv_positions_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """Return which keys each query may see, bool [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    return is_visible(distance_BTS, sliding_window) & (kv_positions_BS >= 0)[:, None, :]


def is_visible(distance: jax.Array, sliding_window: int | None) -> jax.Array:
    """Return whether a query may see a key that is this many positions before it."""
    return distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)


def _attend_block(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    wide = accum_dtype(q_BTNH.dtype)
    # All queries of a key head are rows of one matrix: [B, K] products of [T·G, H] and [S, H].
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * N // K, H)
    scores_BKRS = batched_matmul(q_BKRH, k_BKSH)
    scores_BKTGS = scores_BKRS.reshape(B, K, T, N // K, S) * H**-0.5
    # A finite number, so that a row which sees nothing (padding) stays finite.
    scores_BKTGS = jnp.where(visible_BTS[:, None, :, None], scores_BKTGS, jnp.finfo(wide).min)
    mixed_BKRH, weights_BKRS = _softmax_matmul(scores_BKTGS.reshape(scores_BKRS.shape), v_BKSH)
    tap("weights", weights_BKRS.reshape(scores_BKTGS.shape).swapaxes(2, 3).reshape(B, N, T, S))
    return mixed_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H).astype(q_BTNH.dtype)


@jax.custom_vjp
def _softmax_matmul(scores_BKRS: jax.Array, v_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return softmax(scores) v in at least float32, and the softmax, which has no gradient.

    The backward pass is that of arXiv:2205.14135. It keeps the exponentials in v's dtype, and subtracts the row's mean from
    the gradient before rounding it.
    """
    return _softmax_matmul_forward(scores_BKRS, v_BKSH)[0]


def _softmax_matmul_forward(scores_BKRS: jax.Array, v_BKSH: jax.Array) -> tuple[Any, Any]:
    weights_BKRS = jnp.exp(scores_BKRS - scores_BKRS.max(axis=-1, keepdims=True))
    total_BKR1 = weights_BKRS.sum(axis=-1, keepdims=True)
    rounded_BKRS = weights_BKRS.astype(v_BKSH.dtype)
    # Dividing after the product touches H numbers a row instead of S.
    mixed_BKRH = batched_matmul(rounded_BKRS, v_BKSH.swapaxes(2, 3)) / total_BKR1
    return (mixed_BKRH, weights_BKRS / total_BKR1), (rounded_BKRS, total_BKR1, mixed_BKRH, v_BKSH)


def _softmax_matmul_backward(saved: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    rounded_BKRS, total_BKR1, mixed_BKRH, v_BKSH = saved
    by_mixed_BKRH, _ = gradients
    by_weights_BKRS = dot(by_mixed_BKRH.astype(v_BKSH.dtype), v_BKSH, 3)
    mean_BKR1 = jnp.sum(by_mixed_BKRH * mixed_BKRH, axis=-1, keepdims=True)
    by_scores_BKRS = rounded_BKRS.astype(total_BKR1.dtype) * ((by_weights_BKRS - mean_BKR1) / total_BKR1)
    by_v_BKSH = weight_gradient(rounded_BKRS, (by_mixed_BKRH / total_BKR1).astype(v_BKSH.dtype), 2)
    return by_scores_BKRS, by_v_BKSH.astype(v_BKSH.dtype)


_softmax_matmul.defvjp(_softmax_matmul_forward, _softmax_matmul_backward)

ATTENTION = Op(
    "attention",
    attention_in_blocks,
    {
        Backend.GPU: (
            Implementation("cudnn", cudnn_attention, can_cudnn_attention),
            Implementation("triton", triton_attention, can_triton_attention),
        ),
        Backend.TPU: (Implementation("splash", splash_attention, can_splash_attention),),
    },
)


def attention_cost(step: Step, num_heads: int, num_kv_heads: int, head_dim: int) -> LayerCost:
    """Return the cost of attention in training. The kernel saves no scores, and no compiler's report has its work."""
    T, rows = step.num_tokens, step.num_rows
    products = step.outputs(q_heads=num_heads) * 4 * head_dim * step.num_keys
    flops = Passes(products, 2 * products)
    queries, keys = step.tokens(q_heads=num_heads, head_dim=head_dim), step.tokens(kv_heads=num_kv_heads, head_dim=head_dim)
    q_BTNH = jax.ShapeDtypeStruct((rows, T, num_heads, head_dim), step.dtype)
    k_BKSH = jax.ShapeDtypeStruct((rows, num_kv_heads, T, head_dim), step.dtype)
    is_kernel = step.implementation(ATTENTION, q_BTNH, k_BKSH, k_BKSH, None) == "splash"
    if is_kernel:
        saved = step.tokens(q_heads=num_heads) * LANES * F32_BYTES  # log-sum-exp, one copy per lane
    else:
        seen = (T + query_block(T)) / 2 / T  # blocks of queries do not touch the keys after them
        saved = int(seen * step.tokens(q_heads=num_heads, kv_length=T) * (F32_BYTES + step.itemsize))
    saved += (2 * queries + 3 * keys) * step.itemsize
    return LayerCost(flops=flops, uncounted_flops=flops if is_kernel else NOTHING, saved_bytes=saved)
