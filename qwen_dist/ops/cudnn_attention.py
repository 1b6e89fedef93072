"""Attention without a cache on an NVIDIA GPU, for rows of one sequence each: cuDNN's kernels, forward and backward.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.ops import gpu
from qwen_dist.sharding import LocalShard, active_num_shards, shard_map_op


def can_cudnn_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
) -> bool:
    """Whether cuDNN takes these: it has no wider floats, and no mask by segments; each device needs whole rows."""
    head_dim = q_BTNH.shape[-1]
    is_form = q_BTNH.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= gpu.gpu_features().max_cudnn_head_dim
    return is_form and segments_BT is None and active_num_shards("length", q_BTNH.shape[1]) == 1


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    sliding_window: int | None = None,
    segments_BT: jax.Array | None = None,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Compute `attention.attention` of the same arguments; `implementation="xla"` runs without a GPU.

    The mask is causal by place, so tokens must not see padding before them: such rows are rotated until it is at their end.
    """
    repeats = max(active_num_shards("q_heads", q_BTNH.shape[2]) // k_BKSH.shape[1], 1)
    k_BKSH, v_BKSH = (jnp.repeat(x, repeats, axis=1) for x in (k_BKSH, v_BKSH))
    rows, keys = ("batch", "length", "q_heads", "head_dim"), ("batch", "kv_heads", "kv_length", "head_dim")
    arrays = q_BTNH, k_BKSH, v_BKSH, jnp.argmax(positions_BT >= 0, axis=1)
    body = functools.partial(_local_attention, sliding_window=sliding_window, implementation=implementation)
    (mixed_BTNH,) = shard_map_op(body, arrays, (rows, keys, keys, ("batch",)), (rows,))
    return mixed_BTNH


def _local_attention(
    _: LocalShard,
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    first_B: jax.Array,
    *,
    sliding_window: int | None,
    implementation: Any,
) -> tuple[jax.Array]:
    """Attend from one device's rows and heads."""
    q_BTNH, k_BSKH, v_BSKH = (rotate_rows(x, first_B) for x in (q_BTNH, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)))
    window = None if sliding_window is None else (sliding_window - 1, 0)
    mixed_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=window, implementation=implementation
    )
    return (rotate_rows(mixed_BTNH, -first_B),)


@jax.custom_vjp
def rotate_rows(x_BT: jax.Array, first_B: jax.Array) -> jax.Array:
    """Return [B, T, …] with each row's token `first` in front, and those before it at the end."""
    index_BT = (jnp.arange(x_BT.shape[1]) + first_B[:, None]) % x_BT.shape[1]
    return jax.vmap(lambda x_T, index_T: x_T.at[index_T].get(mode="promise_in_bounds", unique_indices=True))(x_BT, index_BT)


# By default the gradient of a gather is a sum of scattered rows.
rotate_rows.defvjp(
    lambda x_BT, first_B: (rotate_rows(x_BT, first_B), first_B),
    lambda first_B, gradient_BT: (rotate_rows(gradient_BT, -first_B), np.zeros(first_B.shape, jax.dtypes.float0)),
)
