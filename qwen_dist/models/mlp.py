"""The gated MLP that mixes the channels of each token.

Letters: B batch, T length, D embed, F mlp.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import tap
from qwen_dist.models.layers import Linear
from qwen_dist.ops.cost import F32_BYTES, LayerCost, Step
from qwen_dist.ops.swiglu import swiglu
from qwen_dist.sharding import constrain


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) · up(x)), with `mlp` channels between."""

    def __init__(self, embed: int, mlp: int, *, dtype: DTypeLike, std: float):
        outer, inner = {"embed": embed}, {"mlp": mlp}
        self.gate_proj = Linear(inner, outer, bias=False, dtype=dtype, std=std)
        self.up_proj = Linear(inner, outer, bias=False, dtype=dtype, std=std)
        self.down_proj = Linear(outer, inner, bias=False, dtype=dtype, std=std)

    def cost(self, step: Step) -> LayerCost:
        hidden = step.tokens(**dict(self.gate_proj.out_sizes))
        # Where embed is sharded, gate and up are summed together in float32.
        width = 4 * F32_BYTES if step.num_shards("embed") > 1 else 3 * step.itemsize
        saved = 3 * hidden * step.itemsize
        return LayerCost(workspace_bytes=width * hidden, saved_bytes=saved, final_linears=("down_proj",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = tap("gate_proj", self.gate_proj(x_BTD))
        up_BTF = tap("up_proj", self.up_proj(x_BTD))
        hidden_BTF = constrain(swiglu(gate_BTF, up_BTF), "batch", "length", "mlp")
        return tap("down_proj", self.down_proj(hidden_BTF))
