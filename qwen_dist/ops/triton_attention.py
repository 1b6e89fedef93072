"""Attention without a cache on a GPU, for rows of several sequences: jax's Pallas kernels for Triton, both passes.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import jax
import jax.numpy as jnp

from qwen_dist.ops import gpu
from qwen_dist.sharding import LocalShard, active_num_shards, shard_map_op

_MODULE = "jax.experimental.pallas.ops.gpu.attention"
# Rows are padded to a multiple of it.
BLOCK = 128
# Head size → queries and keys that the forward and the backward kernel take at a time. What a block needs must fit the
# registers and the shared memory of a multiprocessor.
FORWARD_BLOCKS = {64: (128, 64), 128: (128, 64), 256: (64, 32)}
BACKWARD_BLOCK = 32


def can_triton_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> bool:
    """Whether the kernel takes these: it rounds wider floats, has no windows, and needs whole rows on each device."""
    is_form = q_BTNH.dtype.itemsize == 2 and q_BTNH.shape[-1] in FORWARD_BLOCKS and sliding_window is None
    has_kernel = gpu.gpu_features().can_run_triton and importlib.util.find_spec(_MODULE) is not None
    return is_form and has_kernel and active_num_shards("length", q_BTNH.shape[1]) == 1


def triton_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attention.attention` of the same arguments; `interpret` runs without a GPU, slowly."""
    # The kernel reads the keys of a head for each of its queries, as many as there are query heads.
    k_BNSH, v_BNSH = (jnp.repeat(x, q_BTNH.shape[2] // k_BKSH.shape[1], axis=1) for x in (k_BKSH, v_BKSH))
    # Padding sees padding: a row without any key would divide by 0.
    segments_BT = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
    segments_BT = jnp.where(positions_BT < 0, -1, segments_BT)
    rows, keys = ("batch", "length", "q_heads", "head_dim"), ("batch", "q_heads", "kv_length", "head_dim")
    arrays = q_BTNH, k_BNSH, v_BNSH, segments_BT
    body = functools.partial(_local_attention, interpret=interpret)
    (mixed_BTNH,) = shard_map_op(body, arrays, (rows, keys, keys, ("batch", "length")), (rows,))
    return mixed_BTNH


def _local_attention(
    _: LocalShard,
    q_BTNH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    segments_BT: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array]:
    """Attend from one device's rows and heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the predicate looks whether this jax still has it
        from jax.experimental.pallas.ops.gpu import attention as kernels

    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    block_q, block_k = FORWARD_BLOCKS[H]
    backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), BACKWARD_BLOCK)
    sizes = kernels.BlockSizes(block_q=block_q, block_k=block_k, **backward)
    q, k, v = (_padded(x) for x in (q_BTNH, k_BNSH.swapaxes(1, 2), v_BNSH.swapaxes(1, 2)))
    segments = jnp.pad(segments_BT, ((0, 0), (0, -T % BLOCK)), constant_values=-1)
    mixed_BTNH = kernels.mha(q, k, v, segments, H**-0.5, True, block_sizes=sizes, interpret=interpret)
    return (mixed_BTNH[:, :T],)


def _padded(x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % BLOCK), (0, 0), (0, 0)))
