"""Grouped-query attention (arXiv:2305.13245) with rotary embedding.

Letters: B batch, T length, X tokens whose outputs are wanted, D embed, N query heads, K key/value heads, S keys,
H head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import tap
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear, RMSNorm, take_positions
from qwen_dist.models.state import LayerState, MixerInputs
from qwen_dist.models.state_spec import AttentionSpec
from qwen_dist.ops import paged_cache
from qwen_dist.ops.attention import attention, attention_cost
from qwen_dist.ops.cost import LayerCost, Step
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.ops.paged_attention import paged_attention, paged_attention_cost
from qwen_dist.ops.paged_cache import PagedState
from qwen_dist.ops.rotary import rotate
from qwen_dist.ops.step_rows import RowGroup, join_groups, split_groups
from qwen_dist.sharding import constrain


class Attention(nnx.Module):
    """Self-attention with rotary embedding, optional q/k normalisation (before the rotation) and optional biases."""

    name = "self_attn"
    of_outputs = ("q_proj", "o_proj")

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        embed = {"embed": config.hidden_size}
        q_heads = {"q_heads": config.num_attention_heads, "head_dim": config.head_dim}
        # With a gate, each head's rows of `q_proj` are those of the query, then those of its gate.
        gated = {"q_heads": config.num_attention_heads, "query_gate": 2, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        std = config.initializer_range
        self.q_proj = Linear(gated if config.attention_gate else q_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.k_proj = Linear(kv_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.v_proj = Linear(kv_heads, embed, bias=config.qkv_bias, dtype=dtype, std=std)
        self.o_proj = Linear(embed, q_heads, bias=config.o_bias, dtype=dtype, std=std)
        norm = functools.partial(RMSNorm, "head_dim", config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        norm = functools.partial(norm, offset=config.norm_offset)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.sliding_window, self.has_gate = layer.sliding_window, config.attention_gate

    @staticmethod
    def state_spec(config: ModelConfig, layer: LayerConfig, dtype: DTypeLike) -> AttentionSpec:
        sizes = config.num_key_value_heads, config.head_dim, jnp.dtype(dtype).name
        num_scales = paged_cache.scales_for(config.head_dim)
        return AttentionSpec(*sizes, window=layer.sliding_window, num_scales=num_scales)

    def cost(self, step: Step) -> LayerCost:
        projected = step.outputs(**dict(self.q_proj.out_sizes)) * step.itemsize  # with gates
        (_, num_heads), (_, head_dim) = self.o_proj.in_sizes
        op_cost = attention_cost if step.phase == "train" else paged_attention_cost
        return op_cost(step, num_heads, dict(self.k_proj.out_sizes)["kv_heads"], head_dim).with_more(projected)

    def __call__(
        self, x_BTD: jax.Array, inputs: MixerInputs, state: LayerState | None
    ) -> tuple[jax.Array, LayerState | None]:
        """Return mixed tokens [B, T, D], or with logit indices [B, X, D], and the state with these tokens in it."""
        query_BTD, rope, positions_BT = x_BTD, inputs.rope, inputs.positions_BT
        if (index_BX := inputs.logit_indices_BX) is not None:
            query_BTD, positions_BT = take_positions(x_BTD, index_BX), take_positions(positions_BT, index_BX, -1)
            rope = take_positions(rope[0], index_BX), take_positions(rope[1], index_BX)
        q_BTNH = tap("q_proj", self.q_proj(query_BTD))
        gate_BTNH = None
        if self.has_gate:
            q_BTNH, gate_BTNH = q_BTNH[..., 0, :], q_BTNH[..., 1, :]
        k_BTKH = tap("k_proj", self.k_proj(x_BTD))
        v_BTKH = tap("v_proj", self.v_proj(x_BTD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH = tap("q_norm", self.q_norm(q_BTNH))
            k_BTKH = tap("k_norm", self.k_norm(k_BTKH))
        q_BTNH = constrain(tap("q_rope", rotate(q_BTNH, *rope)), "batch", "length", "q_heads", "head_dim")
        k_BTKH = constrain(tap("k_rope", rotate(k_BTKH, *inputs.rope)), "batch", "length", "kv_heads", "head_dim")

        if state is None:
            k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
            mixed_BTNH = attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, self.sliding_window, inputs.segments_BT)
        else:
            assert inputs.page_BT is not None
            state = paged_cache.write(state, k_BTKH, v_BTKH, inputs.positions_BT, inputs.page_BT)
            mixed_BTNH = self._attend_in_groups(q_BTNH, positions_BT, state, inputs.groups)
        mixed_BTNH = constrain(tap("mixed", mixed_BTNH), "batch", "length", "q_heads", "head_dim")
        if gate_BTNH is not None:
            open_BTNH = jax.nn.sigmoid(gate_BTNH.astype(accum_dtype(gate_BTNH.dtype))).astype(gate_BTNH.dtype)
            mixed_BTNH = tap("gated", mixed_BTNH * open_BTNH)
        return tap("o_proj", self.o_proj(mixed_BTNH)), state

    def _attend_in_groups(
        self, q_BTNH: jax.Array, positions_BT: jax.Array, state: PagedState, groups: tuple[RowGroup, ...]
    ) -> jax.Array:
        """Attend to the cache, to each group on its own: there are other kernels for rows of one token than for chunks."""
        mixed = []
        rows = zip(split_groups(q_BTNH, groups), split_groups(positions_BT, groups), groups, strict=True)
        for q_of_group, positions_of_group, group in rows:
            assert group.pages is not None
            mixed.append(paged_attention(q_of_group, state, positions_of_group, group.pages, self.sliding_window))
        return join_groups(mixed, len(state.k))
