"""The gated MLP that mixes the channels of each token."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models import native
from qwen_dist.models.capture import tap
from qwen_dist.models.layers import Linear, at_least_float32
from qwen_dist.sharding import constrain, infers_on_one_cpu


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) · up(x)), with `mlp` channels between."""

    def __init__(self, embed: int, mlp: int, *, dtype: DTypeLike, std: float):
        outer, inner = {"embed": embed}, {"mlp": mlp}
        self.gate_proj = Linear(inner, outer, bias=False, dtype=dtype, std=std)
        self.up_proj = Linear(inner, outer, bias=False, dtype=dtype, std=std)
        self.down_proj = Linear(outer, inner, bias=False, dtype=dtype, std=std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = tap("gate_proj", self.gate_proj(x_BTD))
        up_BTF = tap("up_proj", self.up_proj(x_BTD))
        hidden_BTF = constrain(gated(gate_BTF, up_BTF), "batch", "length", "mlp")
        return tap("down_proj", self.down_proj(hidden_BTF))


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, of which the backward pass keeps no more than gate and up."""
    if infers_on_one_cpu() and native.can_gate(gate, up):
        return native.gated(gate, up)
    return silu(gate) * up


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gated(gate, up), (gate, up)


def _gated_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = kept
    # Nothing is added. It is there so that the gradient is waited for: XLA's CPU backend would compute the sigmoid in the
    # forward pass and keep it, in float32.
    wide = gate.astype(at_least_float32(gate.dtype)) + 0 * gradient
    sigmoid = jax.nn.sigmoid(wide)
    by_silu, by_up = gradient * up, gradient * (wide * sigmoid).astype(gate.dtype)
    return (by_silu.astype(wide.dtype) * sigmoid * (1 + wide * (1 - sigmoid))).astype(gate.dtype), by_up


gated.defvjp(_gated_forward, _gated_backward)


def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x)) with one rounding at the end, as PyTorch's; rounding inside of it is also slower on a CPU."""
    return jax.nn.silu(x.astype(at_least_float32(x.dtype))).astype(x.dtype)
