"""A mixer with a recurrent state, as a plug-in: h_t = a_t · h_(t-1) + (1 - a_t) · v_t, with gate a and values v of a token.

Importing this file adds the kind "toy" to the model; nothing else in the project knows it.

Letters: B batch, T length, D embed, F mlp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear, take_positions
from qwen_dist.models.state import LayerState, MixerInputs, update_slots
from qwen_dist.models.state_spec import RecurrentSpec, StateArray
from qwen_dist.models.transformer import MIXERS
from qwen_dist.ops.cost import LayerCost, Passes, Step

START = 0.25  # not 0, so that a slot that is not reset shows


class ToyMixer(nnx.Module):
    name = "linear_attn"
    of_outputs = ("o_proj",)

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        size, std = config.hidden_size, config.initializer_range
        self.gate_proj = Linear({"mlp": size}, {"embed": size}, bias=False, dtype=dtype, std=std)
        self.v_proj = Linear({"mlp": size}, {"embed": size}, bias=False, dtype=dtype, std=std)
        self.o_proj = Linear({"embed": size}, {"mlp": size}, bias=False, dtype=dtype, std=std)
        self.spec = nnx.static(self.state_spec(config, layer, dtype))

    @staticmethod
    def state_spec(config: ModelConfig, layer: LayerConfig, dtype: DTypeLike) -> RecurrentSpec:
        return RecurrentSpec((StateArray((config.hidden_size,), "float32", ("mlp",), initial=START),))

    def cost(self, step: Step) -> LayerCost:
        channels = step.tokens(mlp=self.spec.slot_arrays[0].shape[0])
        # Two products and a sum; gates, values and states are float32.
        return LayerCost(flops=Passes(3 * channels, 6 * channels), workspace_bytes=12 * channels, saved_bytes=12 * channels)

    def __call__(
        self, x_BTD: jax.Array, inputs: MixerInputs, state: LayerState | None
    ) -> tuple[jax.Array, LayerState | None]:
        is_real_BT1 = inputs.positions_BT[..., None] >= 0
        gate_BTF = jnp.where(is_real_BT1, jax.nn.sigmoid(self.gate_proj.to_accumulator(x_BTD)), 1)
        added_BTF = (1 - gate_BTF) * self.v_proj.to_accumulator(x_BTD)  # padding adds nothing
        if state is None:
            start = (jnp.full(x_BTD.shape[-1], START),)
            _, h_BTF = jax.vmap(_recurrence, in_axes=(None, 0))(start, (gate_BTF, added_BTF))
        else:
            h_BTF, state = update_slots(self.spec, state, inputs, (gate_BTF, added_BTF), _recurrence)
        if inputs.logit_indices_BX is not None:
            h_BTF = take_positions(h_BTF, inputs.logit_indices_BX)
        return self.o_proj(h_BTF.astype(x_BTD.dtype)), state


def _recurrence(start: tuple[jax.Array], row: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array], jax.Array]:
    """One row of tokens: (h [F]), (gate [T, F], added [T, F]) → the last h, and all of them [T, F]."""

    def step(h_F: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_F = token[0] * h_F + token[1]
        return h_F, h_F

    last_F, all_TF = jax.lax.scan(step, start[0], row)
    return (last_F,), all_TF


MIXERS["toy"] = ToyMixer
