"""Grouped-query attention (arXiv:2305.13245): N query heads share K key/value heads, G = N / K each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models import cache as kv_cache
from qwen_dist.models.capture import scope, tap
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear, RMSNorm, at_least_float32, product, sum_over_rows, take_positions
from qwen_dist.models.paged_attention import attend_pages
from qwen_dist.models.rope import rotate
from qwen_dist.models.splash_attention import attend_tiles
from qwen_dist.sharding import constrain, num_parts, platform

# Queries are taken in blocks so that the scores of a block stay in a CPU's cache and keys after the block are not touched.
# A compiler's time grows with the number of blocks: eight leave one key in nine too many.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 128, 8


class Attention(nnx.Module):
    """Self-attention with rotary embedding, optional q/k normalisation (before the rotation) and optional biases."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        embed = {"embed": config.hidden_size}
        q_heads = {"q_heads": config.num_attention_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        std = config.initializer_range
        self.q_proj = Linear(q_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.k_proj = Linear(kv_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.v_proj = Linear(kv_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.o_proj = Linear(embed, q_heads, bias=config.o_bias, dtype=dtype, std=std)
        norm = functools.partial(RMSNorm, "head_dim", config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.sliding_window = layer.sliding_window

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions_BT: jax.Array,
        cache: kv_cache.LayerCache | None,
        pages: kv_cache.Pages | None,
        segments_BT: jax.Array | None,
        only_B: jax.Array | None = None,
    ) -> tuple[jax.Array, kv_cache.LayerCache | None]:
        """Mixed tokens [B, T, D], or with a cache and `only_B` [B, 1, D]: of each row the one with that index."""
        asking_BTD, rope_of_q, q_positions_BT = x_BTD, rope, positions_BT
        if only_B is not None:
            asking_BTD, q_positions_BT = take_positions(x_BTD, only_B), take_positions(positions_BT, only_B, -1)
            rope_of_q = take_positions(rope[0], only_B), take_positions(rope[1], only_B)
        q_BTNH = tap("q_proj", self.q_proj(asking_BTD))
        k_BTKH = tap("k_proj", self.k_proj(x_BTD))
        v_BTKH = tap("v_proj", self.v_proj(x_BTD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = tap("q_norm", self.q_norm(q_BTNH))
            k_BTKH = tap("k_norm", self.k_norm(k_BTKH))
        q_BTNH = constrain(tap("q_rope", rotate(q_BTNH, *rope_of_q)), "batch", "length", "q_heads", "head_dim")
        k_BTKH = constrain(tap("k_rope", rotate(k_BTKH, *rope)), "batch", "length", "kv_heads", "head_dim")

        if cache is None or pages is None:
            k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
            assert only_B is None
            mixed_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, positions_BT, self.sliding_window, segments_BT)
        else:
            cache = kv_cache.write(cache, k_BTKH, v_BTKH, positions_BT, pages)
            mixed_BTNH = attend_pages(q_BTNH, cache, q_positions_BT, pages, self.sliding_window)
        mixed_BTNH = constrain(tap("mixed", mixed_BTNH), "batch", "length", "q_heads", "head_dim")
        return tap("o_proj", self.o_proj(mixed_BTNH)), cache


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(q·k / √H) v over the keys each query may see, [B, T, N, H] in q's dtype; the softmax in at least float32.

    Queries and keys are of the same tokens in order: query t needs no key after the t-th, whatever its position, and a
    block of queries does not touch the rest. A query at position p sees the keys at positions 0 … p, or the last
    `sliding_window` of them, and with `segments_BT` only those of its own segment; a negative position is padding, seen by
    none.
    """
    T = q_BTNH.shape[1]
    C = num_parts("length", T)
    if platform() == "tpu" and q_BTNH.dtype.itemsize < 4 and C == 1:
        return attend_tiles(q_BTNH, k_BKSH, v_BKSH, positions_BT, sliding_window, segments_BT)
    # With the length split over C devices (context parallelism) each has its own queries and all keys. A block then has as
    # many queries of each device, of which the last device's see the most.
    k_BKSH = constrain(k_BKSH, "batch", "kv_heads", "kv_length", "head_dim")
    v_BKSH = constrain(v_BKSH, "batch", "kv_heads", "kv_length", "head_dim")
    q_BCTNH, positions_BCT = split(q_BTNH, C), split(positions_BT, C)
    outputs = []
    size = query_block(T // C)
    for start in range(0, T // C, size):
        block = slice(start, min(start + size, T // C))
        end = T - T // C + block.stop
        seen_BTS = visible(join(positions_BCT[:, :, block]), positions_BT[:, :end], sliding_window)
        if segments_BT is not None:
            seen_BTS &= join(split(segments_BT, C)[:, :, block])[:, :, None] == segments_BT[:, None, :end]
        with scope(f"queries_{start}"):
            mixed_BTNH = _attend_block(join(q_BCTNH[:, :, block]), k_BKSH[:, :, :end], v_BKSH[:, :, :end], seen_BTS)
            outputs.append(split(mixed_BTNH, C))
    return join(outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2))


def query_block(num_queries: int) -> int:
    """How many of so many queries `attend` takes at a time."""
    return min(num_queries, max(QUERY_BLOCK, -(-num_queries // MAX_QUERY_BLOCKS)))


def split(x_BT: jax.Array, parts: int) -> jax.Array:
    """[B, T, …] as [B, C, T/C, …]."""
    B, T, *rest = x_BT.shape
    return x_BT.reshape(B, parts, T // parts, *rest)


def join(x_BCT: jax.Array) -> jax.Array:
    """[B, C, T, …] as [B, C·T, …]."""
    B, C, T, *rest = x_BCT.shape
    return x_BCT.reshape(B, C * T, *rest)


def visible(q_positions_BT: jax.Array, kv_positions_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """Which keys each query may see, bool [B, T, S]."""
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (kv_positions_BS >= 0)[:, None, :]
    return seen_BTS if sliding_window is None else seen_BTS & (distance_BTS < sliding_window)


def _attend_block(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    wide = at_least_float32(q_BTNH.dtype)
    # All of a key head's queries are rows of one matrix: [B, K] products of [T·G, H] and [S, H].
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * N // K, H)
    scores_BKRS = product(q_BKRH, k_BKSH)
    scores_BKTGS = scores_BKRS.reshape(B, K, T, N // K, S) * H**-0.5
    # A finite number, so that a row which sees nothing (padding) stays finite.
    scores_BKTGS = jnp.where(visible_BTS[:, None, :, None], scores_BKTGS, jnp.finfo(wide).min)
    mixed_BKRH, weights_BKRS = _softmax_product(scores_BKTGS.reshape(scores_BKRS.shape), v_BKSH)
    tap("weights", weights_BKRS.reshape(scores_BKTGS.shape).swapaxes(2, 3).reshape(B, N, T, S))
    return mixed_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H).astype(q_BTNH.dtype)


@jax.custom_vjp
def _softmax_product(scores_BKRS: jax.Array, v_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """softmax(scores) v in at least float32, and the softmax, which is only looked at.

    The backward pass is that of arXiv:2205.14135: it keeps the exponentials in v's type, and the gradient by them, of which
    the row's mean is taken away, is not rounded before that.
    """
    return _softmax_product_forward(scores_BKRS, v_BKSH)[0]


def _softmax_product_forward(scores_BKRS: jax.Array, v_BKSH: jax.Array) -> tuple[Any, Any]:
    weights_BKRS = jnp.exp(scores_BKRS - scores_BKRS.max(axis=-1, keepdims=True))
    total_BKR1 = weights_BKRS.sum(axis=-1, keepdims=True)
    rounded_BKRS = weights_BKRS.astype(v_BKSH.dtype)
    # Dividing after the product touches H numbers a row instead of S.
    mixed_BKRH = product(rounded_BKRS, v_BKSH.swapaxes(2, 3)) / total_BKR1
    return (mixed_BKRH, weights_BKRS / total_BKR1), (rounded_BKRS, total_BKR1, mixed_BKRH, v_BKSH)


def _softmax_product_backward(saved: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    rounded_BKRS, total_BKR1, mixed_BKRH, v_BKSH = saved
    by_mixed_BKRH, _ = gradients
    by_weights_BKRS = product(by_mixed_BKRH.astype(v_BKSH.dtype), v_BKSH)
    mean_BKR1 = jnp.sum(by_mixed_BKRH * mixed_BKRH, axis=-1, keepdims=True)
    by_scores_BKRS = rounded_BKRS.astype(total_BKR1.dtype) * ((by_weights_BKRS - mean_BKR1) / total_BKR1)
    by_v_BKSH = sum_over_rows(rounded_BKRS, (by_mixed_BKRH / total_BKR1).astype(v_BKSH.dtype), 2)
    return by_scores_BKRS, by_v_BKSH.astype(v_BKSH.dtype)


_softmax_product.defvjp(_softmax_product_forward, _softmax_product_backward)
