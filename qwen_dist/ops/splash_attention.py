"""Attention without a cache on a TPU: jax's splash attention kernel, forward and backward.

The kernel keeps scores in the chip's own memory, and compiles in seconds, where the compiler takes minutes for the gradient
of the plain form, `attention.attention_in_blocks`.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.sharding import LocalShard, active_num_shards, shard_map_op

# Queries, and keys, that the kernel takes at a time; it needs multiples of 128.
BLOCK, LANES = 512, 128


def can_splash_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> bool:
    """Whether the kernel takes these: it would round wider floats, and needs whole rows on each device."""
    return q_BTNH.dtype.itemsize < 4 and active_num_shards("length", q_BTNH.shape[1]) == 1


def splash_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attention.attention` of the same arguments.

    Scores and sums are float32. The factor 1 / √H is multiplied into the queries, which rounds them once more where H is
    not a power of 4. `interpret` runs the kernel without a TPU, slowly.
    """
    N, H = q_BTNH.shape[2:]
    # With fewer key heads than devices along the query heads, each device gets the one that its queries read.
    repeats = max(active_num_shards("q_heads", N) // k_BKSH.shape[1], 1)
    k_BKSH, v_BKSH = (jnp.repeat(x, repeats, axis=1) for x in (k_BKSH, v_BKSH))
    # Padding sees padding: a row without any key would divide by 0.
    segments_BT = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
    segments_BT = jnp.where(positions_BT < 0, -1, segments_BT)
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)

    rows, keys = ("batch", "length", "q_heads", "head_dim"), ("batch", "kv_heads", "kv_length", "head_dim")
    body = functools.partial(_local_attention, sliding_window=sliding_window, interpret=interpret)
    arrays, axes = (scaled_BTNH, k_BKSH, v_BKSH, segments_BT), (rows, keys, keys, ("batch", "length"))
    (mixed_BTNH,) = shard_map_op(body, arrays, axes, (rows,))
    return mixed_BTNH


def _local_attention(
    _: LocalShard,
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> tuple[jax.Array]:
    """Attend from one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    T, N = q_BTNH.shape[1:3]
    block = min(BLOCK, -(-T // LANES) * LANES)
    padding = -T % block
    kernel = _kernel(N, T + padding, block, sliding_window, interpret)

    def row(q_TNH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, segments_T: jax.Array) -> jax.Array:
        q_NTH, k_KSH, v_KSH = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q_TNH.swapaxes(0, 1), k_KSH, v_KSH))
        ids = jnp.pad(segments_T, (0, padding), constant_values=-1)
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=SegmentIds(ids, ids)).swapaxes(0, 1)[:T]

    return (jax.vmap(row)(q_BTNH, k_BKSH, v_BKSH, segments_BT),)


def _kernel(num_heads: int, length: int, block: int, sliding_window: int | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if sliding_window is None else masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    return splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * num_heads), block_sizes=splash.BlockSizes(**sizes), interpret=interpret
    )
