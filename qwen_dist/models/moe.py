"""A mixture of experts (arXiv:1701.06538): each token goes through the few MLPs that its router scores highest.

No token is dropped, however uneven the loads of the experts are. `ops.experts` computes them.

Letters: B batch, T length, D embed, E experts, K experts of a token, F mlp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import observed, scope, tap
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.layers import Linear
from qwen_dist.models.mlp import MLP
from qwen_dist.models.parameters import declare_param
from qwen_dist.ops.cost import LayerCost, Step
from qwen_dist.ops.experts import ExpertWeights, experts, experts_cost
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import all_gather_weight

Axes = tuple[str, ...]


class MoE(nnx.Module):
    """Router, experts and, in qwen2_moe, a shared expert for every token, weighted by its own gate."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        moe, std = config.moe, config.initializer_range
        assert moe is not None
        self.config = moe
        embed = {"embed": config.hidden_size}
        self.gate = Linear({"router": moe.num_experts}, embed, bias=False, dtype=dtype, std=std)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.expert_size, dtype=dtype, std=std)
        shared = moe.shared_expert_size
        self.shared_expert = None if shared is None else MLP(config.hidden_size, shared, dtype=dtype, std=std)
        self.shared_expert_gate = None if shared is None else Linear({"router": 1}, embed, bias=False, dtype=dtype, std=std)

    def cost(self, step: Step) -> LayerCost:
        moe, sizes = self.config, dict(self.experts.sizes)
        return experts_cost(
            step, moe.num_experts, moe.experts_per_token, sizes["embed"], sizes["mlp"], self.experts.adapter_sizes()
        )

    def __call__(self, x_BTD: jax.Array, is_real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the mixed tokens [B, T, D] and the router's logits [B, T, E], these in at least float32.

        Padding (where not `is_real_BT`) goes through no expert, so it costs nothing and fills no queue.
        """
        logits_BTE = tap("gate", self.gate.to_accumulator(x_BTD))
        scores_BTK, chosen_BTK = route(logits_BTE, self.config.experts_per_token, self.config.normalize_scores)
        scores_BTK, chosen_BTK = tap("scores", scores_BTK), tap("chosen", chosen_BTK)
        # Padding chooses the expert number after the last, which is out of range.
        chosen_BTK = jnp.where(is_real_BT[..., None], chosen_BTK, self.config.num_experts).astype(jnp.int32)
        mixed_BTD, each_BTKD = self.experts(x_BTD, chosen_BTK, scores_BTK)
        tap("expert_outputs", each_BTKD)
        mixed_BTD = tap("experts", mixed_BTD)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            with scope("shared_expert"):
                shared_BTD = self.shared_expert(x_BTD)
            share_BT1 = jax.nn.sigmoid(tap("shared_expert_gate", self.shared_expert_gate.to_accumulator(x_BTD)))
            mixed_BTD = (mixed_BTD + share_BT1 * shared_BTD).astype(x_BTD.dtype)
        return mixed_BTD, logits_BTE


def route(logits_BTE: jax.Array, experts_per_token: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """Return the scores, in at least float32, and the numbers [B, T, K] of each token's experts, the highest first."""
    probabilities_BTE = jax.nn.softmax(logits_BTE.astype(accum_dtype(logits_BTE.dtype)))
    scores_BTK, chosen_BTK = jax.lax.top_k(probabilities_BTE, experts_per_token)
    return scores_BTK / scores_BTK.sum(-1, keepdims=True) if normalize else scores_BTK, chosen_BTK


def load_balancing_loss(router_logits: Sequence[jax.Array], experts_per_token: int, is_real_BT: jax.Array) -> jax.Array:
    """Return E · Σ over experts of (fraction of tokens that chose it) · (mean probability): arXiv:2101.03961, eq. 4-6.

    Both means are over the real tokens of all layers together, as in `load_balancing_loss_func` of transformers. It is K
    when all experts are chosen equally often. Only the probabilities have a gradient.
    """
    num_experts = router_logits[0].shape[-1]
    chosen_E = probability_E = jnp.zeros(num_experts, router_logits[0].dtype)
    for logits_BTE in router_logits:
        probabilities_BTE = jax.nn.softmax(logits_BTE)
        _, chosen_BTK = jax.lax.top_k(logits_BTE, experts_per_token)
        is_chosen_BTE = jax.nn.one_hot(chosen_BTK, num_experts, dtype=probabilities_BTE.dtype).sum(-2)
        chosen_E += jnp.where(is_real_BT[..., None], is_chosen_BTE, 0).sum((0, 1))
        probability_E += jnp.where(is_real_BT[..., None], probabilities_BTE, 0).sum((0, 1))
    num_rows = len(router_logits) * is_real_BT.sum()
    return num_experts * jnp.sum(chosen_E / num_rows * (probability_E / num_rows))


# The dimensions of each expert matrix besides the experts: out, and in.
EXPERT_MATRICES: dict[str, tuple[Axes, Axes]] = {
    "gate_up_proj": (("gate_up", "mlp"), ("embed",)),
    "down_proj": (("embed",), ("mlp",)),
}


class Experts(nnx.Module):
    """The experts' weights: `gate_up_proj` [E, 2, F, D] and `down_proj` [E, D, F]; `lora` has their adapters."""

    def __init__(self, num_experts: int, embed: int, mlp: int, *, dtype: DTypeLike, std: float):
        self.sizes = (("experts", num_experts), ("gate_up", 2), ("mlp", mlp), ("embed", embed))
        self.gate_up_proj = _declare(dict(self.sizes), *EXPERT_MATRICES["gate_up_proj"], dtype=dtype, std=std)
        self.down_proj = _declare(dict(self.sizes), *EXPERT_MATRICES["down_proj"], dtype=dtype, std=std)
        self.lora: nnx.Dict[Any] = nnx.Dict()
        self.lora_scale, self.lora_rank = 0.0, 0

    def add_lora(self, name: str, rank: int, scale: float, *, dtype: DTypeLike) -> None:
        """Give every expert's matrix `name` a low-rank adapter, as `Linear.add_lora`: A [E, R, …] and B [E, …, R]."""
        (out, inp), sizes = EXPERT_MATRICES[name], dict(self.sizes) | {"lora_rank": rank}
        lora_A = _declare(sizes, ("lora_rank",), inp, dtype=dtype, std=(3 * sizes[inp[0]]) ** -0.5)
        lora_B = _declare(sizes, out, ("lora_rank",), dtype=dtype, std=0.0)
        self.lora[name] = nnx.Dict(lora_A=nnx.Dict(weight=lora_A), lora_B=nnx.Dict(weight=lora_B))
        self.lora_scale, self.lora_rank = scale, rank

    def adapter_sizes(self) -> list[dict[str, int]]:
        """Return the dimensions of each matrix of an expert's adapters."""
        sizes, rank = dict(self.sizes), {"lora_rank": self.lora_rank}
        return [{axis: sizes[axis] for axis in side} | rank for name in self.lora for side in EXPERT_MATRICES[name]]

    def __call__(self, x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the sum of each token's experts by their scores, [B, T, D], and each expert's output [B, T, K, D]."""
        gate_up, down = (self._weights(name) for name in EXPERT_MATRICES)
        axes = self._axes("gate_up_proj"), self._axes("down_proj")
        return experts(observed(self, x_BTD), chosen_BTK, scores_BTK, gate_up, down, axes)

    def _weights(self, name: str) -> ExpertWeights:
        axes = self._axes(name)
        weight = all_gather_weight(getattr(self, name).get_value(), *axes.weight)
        if name not in self.lora:
            return ExpertWeights(weight)
        lora_A, lora_B = (self.lora[name][side]["weight"][...] for side in ("lora_A", "lora_B"))
        lora_A, lora_B = all_gather_weight(lora_A, *axes.lora_A), all_gather_weight(lora_B, *axes.lora_B)
        return ExpertWeights(weight, lora_A, lora_B, self.lora_scale)

    def _axes(self, name: str) -> ExpertWeights:
        """Return the logical names of the dimensions of `_weights`."""
        out, inp = EXPERT_MATRICES[name]
        if name not in self.lora:
            return ExpertWeights(("experts", *out, *inp))
        lora_A, lora_B = ("experts", "lora_rank", *inp), ("experts", *out, "lora_rank")
        return ExpertWeights(("experts", *out, *inp), lora_A, lora_B, self.lora_scale)


def _declare(sizes: Mapping[str, int], out: Axes, inp: Axes, *, dtype: DTypeLike, std: float) -> nnx.Param:
    axes = ("experts", *out, *inp)
    shape = tuple(sizes[axis] for axis in axes)
    disk_shape = (shape[0], math.prod(sizes[axis] for axis in out), shape[-1])
    return declare_param(jax.ShapeDtypeStruct(shape, dtype), axes, std=std, disk_shape=disk_shape)
