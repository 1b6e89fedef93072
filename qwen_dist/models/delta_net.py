"""Gated delta net (arXiv:2412.06464), the linear attention of Qwen3-Next and Qwen3.5: a short convolution over the tokens,
the gated delta rule, and a norm gated by the token.

Letters: B batch, T length, X tokens whose outputs are wanted, D embed, G key heads, R value heads of a key head,
K key channels, V value channels, C channels of a key head in the convolution (2 K + R V), W taps of the convolution.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import is_capturing, tap
from qwen_dist.models.config import DeltaNetConfig, LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear, parameter, take_positions
from qwen_dist.models.state import LayerState, MixerInputs, num_state_shards
from qwen_dist.models.state_spec import RecurrentSpec, StateArray
from qwen_dist.ops import slots
from qwen_dist.ops.cost import LayerCost, Step
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule, delta_rule_cost, delta_rule_in_slots
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.ops.rounding import rounded
from qwen_dist.ops.short_convolution import short_convolution, short_convolution_flops
from qwen_dist.ops.step_rows import RowGroup, join_groups, slot_rows, split_groups
from qwen_dist.sharding import all_gather_weight, constrain

_SEPARATE = ("in_proj_z", "in_proj_b", "in_proj_a")
_HEAD_AXES = ("batch", "length", "key_heads", "head_channels")
# Where the tokens of a row are spread over devices, these exchange tokens for heads before the recurrence.
_SCAN_AXES = ("batch", "scan_length", "scan_heads", "head_channels")


class GatedDeltaNet(nnx.Module):
    """A mixer whose state is a matrix for each value head, and the last tokens of the convolution.

    On disk the rows of `in_proj_qkv` and `conv1d` are all queries, then all keys, then all values; here they are by key
    head. qwen3_next stores `in_proj_qkvz` and `in_proj_ba` instead of four projections, by key head on disk, too.
    """

    name = "linear_attn"
    of_outputs = ("out_proj",)

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        net = config.delta_net
        assert net is not None
        self.sizes = net
        embed, std = {"embed": config.hidden_size}, config.initializer_range
        sections = (net.key_dim, net.key_dim, net.group_values)

        def project(channels: int) -> Linear:
            heads = {"key_heads": net.num_key_heads, "head_channels": channels}
            return Linear(heads, embed, bias=False, dtype=dtype, std=std)

        if net.has_fused_projections:
            self.in_proj_qkvz = project(sum(sections) + net.group_values)
            self.in_proj_ba = project(2 * net.values_per_key)
        else:
            blocks = _blocks_of_head(net)
            self.in_proj_qkv = Linear(blocks, embed, bias=False, dtype=dtype, std=std, sections=sections)
            self.in_proj_z = project(net.group_values)
            self.in_proj_b, self.in_proj_a = project(net.values_per_key), project(net.values_per_key)
        self.conv1d = ShortConvolution(net, sections, dtype=dtype, std=std)
        # Kept in float32, as some checkpoints store them; of the others nothing is lost.
        wide, heads = accum_dtype(dtype), {"key_heads": net.num_key_heads, "value_heads": net.values_per_key}
        self.A_log = parameter(heads, dtype=wide)
        self.dt_bias = parameter(heads, dtype=dtype)
        self.norm = GatedRMSNorm(net.value_dim, eps=config.rms_norm_eps, dtype=wide)
        values = {"key_heads": net.num_key_heads, "head_channels": net.group_values}
        self.out_proj = Linear(embed, values, bias=False, dtype=dtype, std=std)

    @staticmethod
    def state_spec(config: ModelConfig, layer: LayerConfig, dtype: DTypeLike) -> RecurrentSpec:
        net = config.delta_net
        assert net is not None
        matrix = (net.num_key_heads, net.values_per_key, net.key_dim, net.value_dim)
        columns = (net.conv_taps - 1, net.num_key_heads, net.conv_channels)
        return RecurrentSpec(
            (
                StateArray(matrix, accum_dtype(dtype).name, ("key_heads", "value_heads", "head_dim", "head_dim")),
                StateArray(columns, jnp.dtype(dtype).name, ("taps", "key_heads", "head_channels")),
            )
        )

    def cost(self, step: Step) -> LayerCost:
        net, itemsize = self.sizes, step.itemsize
        rule = delta_rule_cost(step, net.num_key_heads, net.values_per_key, net.key_dim, net.value_dim)
        heads = step.size(batch=step.num_rows, scan_length=step.num_tokens, scan_heads=net.num_key_heads)
        return dataclasses.replace(
            rule,
            flops=rule.flops + short_convolution_flops(step, net.num_key_heads, net.conv_channels, net.conv_taps),
            workspace_bytes=rule.workspace_bytes + heads * (2 * net.conv_channels + net.group_values) * itemsize,
            saved_bytes=rule.saved_bytes + heads * (2 * net.conv_channels + 3 * net.group_values) * itemsize,
        )

    def __call__(
        self, x_BTD: jax.Array, inputs: MixerInputs, state: LayerState | None
    ) -> tuple[jax.Array, LayerState | None]:
        """Return mixed tokens [B, T, D], or with logit indices [B, X, D], and the state with these tokens in it."""
        is_real_BT = inputs.positions_BT >= 0
        qkv_BTGC, z_BTGV, b_BTGR, a_BTGR = self._project(x_BTD)
        qkv_BTGC = constrain(qkv_BTGC, *_SCAN_AXES)
        # Padding must be 0 to the convolution of the tokens after it.
        qkv_BTGC = jnp.where(is_real_BT[..., None, None], qkv_BTGC, 0)
        if state is None:
            o_BTGRV = self._without_state(qkv_BTGC, b_BTGR, a_BTGR, inputs)
        else:
            outputs, tokens = [], [split_groups(x, inputs.groups) for x in (qkv_BTGC, b_BTGR, a_BTGR)]
            for group, qkv, b, a in zip(inputs.groups, *tokens, strict=True):
                o_of_group, state = self._in_slots(qkv, b, a, group, state)
                outputs.append(o_of_group)
            o_BTGRV = join_groups(outputs, num_state_shards(state))
        o_BTGRV = constrain(o_BTGRV.astype(x_BTD.dtype), *_HEAD_AXES[:3], "value_heads", "head_channels")
        o_BTGRV = tap("core", o_BTGRV)
        if inputs.logit_indices_BX is not None:
            o_BTGRV, z_BTGV = (take_positions(x, inputs.logit_indices_BX) for x in (o_BTGRV, z_BTGV))
        gated_BTGRV = tap("norm", self.norm(o_BTGRV, z_BTGV.reshape(o_BTGRV.shape)))
        gated_BTGV = constrain(gated_BTGRV.reshape(z_BTGV.shape), *_HEAD_AXES)
        return tap("out_proj", self.out_proj(gated_BTGV)), state

    def _without_state(self, qkv_BTGC: jax.Array, b_BTGR: jax.Array, a_BTGR: jax.Array, inputs: MixerInputs) -> jax.Array:
        """Return the outputs of the rule [B, T, G, R, V] for rows of whole sequences."""
        is_real_BT = inputs.positions_BT >= 0
        segments_BT = None if inputs.segments_BT is None else _extended(inputs.segments_BT, is_real_BT)
        conv_BTGC, _ = self.conv1d(qkv_BTGC, None, segments_BT)
        rule = self._rule_inputs(conv_BTGC, b_BTGR, a_BTGR, is_real_BT)
        if is_capturing():
            for end in state_ends(qkv_BTGC.shape[1]):
                tap(f"state_{end}", delta_rule(jax.tree.map(lambda x: x[:, :end], rule))[1])  # noqa: B023
        return delta_rule(rule, None, segments_BT)[0]

    def _in_slots(
        self, qkv_BTGC: jax.Array, b_BTGR: jax.Array, a_BTGR: jax.Array, group: RowGroup, state: LayerState
    ) -> tuple[jax.Array, LayerState]:
        """Return the outputs of the rule for a group of rows of a step, and the state with these tokens in it."""
        is_real_BT, rows, taps_before = group.positions_BT >= 0, slot_rows(group), self.sizes.conv_taps - 1
        qkv_BTGC, state = slots.in_turn(qkv_BTGC, state)
        before_BWGC = slots.gather(state[1], rows, dtype=qkv_BTGC.dtype)
        if rows.continues_B is not None:
            previous_BWGC = jnp.roll(qkv_BTGC[:, -taps_before:], 1, axis=0)
            before_BWGC = jnp.where(rows.continues_B[:, None, None, None], previous_BWGC, before_BWGC)
        conv_BTGC, with_before_BTGC = self.conv1d(qkv_BTGC, before_BWGC, None)
        o_BTGRV, matrices = delta_rule_in_slots(self._rule_inputs(conv_BTGC, b_BTGR, a_BTGR, is_real_BT), state[0], rows)
        index_BW = is_real_BT.sum(1)[:, None] + jnp.arange(taps_before)
        columns = slots.scatter(state[1], rows, take_positions(with_before_BTGC, index_BW))
        return slots.in_turn(o_BTGRV, (matrices, columns))

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values by key head [B, T, G, C], and z, b and a of its value heads."""
        if not self.sizes.has_fused_projections:
            qkv = self.in_proj_qkv(x_BTD)
            qkv_BTGC = tap("in_proj_qkv", qkv.reshape(*qkv.shape[:3], -1))
            z_BTGV, b_BTGR, a_BTGR = (tap(name, getattr(self, name)(x_BTD)) for name in _SEPARATE)
            return qkv_BTGC, z_BTGV, b_BTGR, a_BTGR
        qkvz_BTGC, ba_BTGR = (tap(name, getattr(self, name)(x_BTD)) for name in ("in_proj_qkvz", "in_proj_ba"))
        qkv_BTGC, z_BTGV = jnp.split(qkvz_BTGC, [self.sizes.conv_channels], axis=-1)
        b_BTGR, a_BTGR = jnp.split(ba_BTGR, 2, axis=-1)
        return qkv_BTGC, z_BTGV, b_BTGR, a_BTGR

    def _rule_inputs(
        self, conv_BTGC: jax.Array, b_BTGR: jax.Array, a_BTGR: jax.Array, is_real_BT: jax.Array
    ) -> DeltaInputs:
        """Return what the rule needs, 0 for padding."""
        conv_BTGC = constrain(tap("conv", conv_BTGC), *_SCAN_AXES)
        net, wide = self.sizes, accum_dtype(conv_BTGC.dtype)
        q_BTGK, k_BTGK, v_BTGV = jnp.split(conv_BTGC, [net.key_dim, 2 * net.key_dim], axis=-1)
        v_BTGRV = v_BTGV.reshape(*v_BTGV.shape[:-1], net.values_per_key, net.value_dim)
        beta_BTGR = tap("beta", jax.nn.sigmoid(b_BTGR.astype(wide)).astype(b_BTGR.dtype))
        A_log_GR, dt_bias_GR = (
            all_gather_weight(x[...], "key_heads", "value_heads").astype(wide) for x in (self.A_log, self.dt_bias)
        )
        g_BTGR = tap("g", -jnp.exp(A_log_GR) * jax.nn.softplus(a_BTGR.astype(wide) + dt_bias_GR))
        g_BTGR, beta_BTGR = (constrain(x, *_SCAN_AXES[:3], "value_heads") for x in (g_BTGR, beta_BTGR))
        inputs = DeltaInputs(q_BTGK, k_BTGK, v_BTGRV, g_BTGR, beta_BTGR)
        return DeltaInputs(*(jnp.where(is_real_BT.reshape(*is_real_BT.shape, *(1,) * (x.ndim - 2)), x, 0) for x in inputs))


class ShortConvolution(nnx.Module):
    """y_t = silu(Σ_i w_i x_(t - W + 1 + i)) for each channel, with 0 before a sequence starts."""

    def __init__(self, net: DeltaNetConfig, sections: tuple[int, ...], *, dtype: DTypeLike, std: float):
        disk_shape = (net.num_key_heads * net.conv_channels, 1, net.conv_taps)
        taps = {"taps": net.conv_taps}
        self.weight = parameter(_blocks_of_head(net), taps, dtype=dtype, std=std, disk_shape=disk_shape, sections=sections)
        self.num_taps = net.conv_taps

    def __call__(
        self, x_BTGC: jax.Array, before_BWGC: jax.Array | None, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return y, and x with the W - 1 tokens before it [B, W - 1 + T, G, C]; `before_BWGC` has them, or they are 0."""
        if before_BWGC is None:
            before_BWGC = jnp.zeros((len(x_BTGC), self.num_taps - 1, *x_BTGC.shape[2:]), x_BTGC.dtype)
        before_BWGC = before_BWGC.astype(x_BTGC.dtype)
        weight = all_gather_weight(self.weight[...], "key_heads", "head_blocks", "head_channels", "taps")
        weight_GCW = weight.reshape(*x_BTGC.shape[2:], self.num_taps)
        y_BTGC = short_convolution(x_BTGC, before_BWGC, weight_GCW, segments_BT)
        return y_BTGC, jnp.concatenate([before_BWGC, x_BTGC], axis=1)


class GatedRMSNorm(nnx.Module):
    """x / rms(x) · weight · silu(z) over the value channels; cast back before the weight and before the gate."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.weight = parameter({"head_dim": size}, dtype=dtype)
        self.eps = eps

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        wide = accum_dtype(x.dtype)
        variance = jnp.mean(jnp.square(x.astype(wide)), axis=-1, keepdims=True)
        normed = rounded(x.astype(wide) * jax.lax.rsqrt(variance + self.eps), x.dtype)
        weighted = rounded(all_gather_weight(self.weight[...], "head_dim").astype(wide) * normed, x.dtype)
        return (weighted * jax.nn.silu(z.astype(wide))).astype(x.dtype)


def state_ends(num_tokens: int) -> list[int]:
    """Return after how many tokens the state is compared with another implementation's: 64, 128, 256, …, and all."""
    return [*(64 << n for n in range(num_tokens.bit_length()) if 64 << n < num_tokens), num_tokens]


def _blocks_of_head(net: DeltaNetConfig) -> dict[str, int]:
    """Return the dimensions of the convolved channels by key head, in blocks that are one piece on disk."""
    size = math.gcd(net.key_dim, net.group_values)
    return {"key_heads": net.num_key_heads, "head_blocks": net.conv_channels // size, "head_channels": size}


def _extended(segments_BT: jax.Array, is_real_BT: jax.Array) -> jax.Array:
    """Give padding the segment of the token before it."""
    return jax.lax.cummax(jnp.where(is_real_BT, segments_BT, -1), axis=1)
