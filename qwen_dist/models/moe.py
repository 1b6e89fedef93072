"""A mixture of experts (arXiv:1701.06538): each token goes through the few MLPs that its router scores highest.

Every token reaches every one of its experts, however uneven the loads are: nothing has a capacity that drops tokens. Where
experts are on different devices, tokens travel to them and back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models import native
from qwen_dist.models.capture import scope, tap
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.grouped import grouped_product
from qwen_dist.models.layers import Linear, at_least_float32
from qwen_dist.models.mlp import MLP
from qwen_dist.sharding import LocalShard, declare_param, infers_on_one_cpu, shard_map_op

Axes = tuple[str, ...]


class MoE(nnx.Module):
    """Router, experts and, in qwen2_moe, an expert that every token is given to, weighed by a gate of its own."""

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

    def __call__(self, x_BTD: jax.Array, is_real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the mixed tokens [B, T, D] and the router's logits [B, T, E], these in at least float32.

        Padding (where not `is_real_BT`) goes through no expert, so that it costs nothing and fills nobody's queue.
        """
        logits_BTE = tap("gate", self.gate.unrounded(x_BTD))
        scores_BTK, chosen_BTK = route(logits_BTE, self.config.experts_per_token, self.config.normalize_scores)
        scores_BTK, chosen_BTK = tap("scores", scores_BTK), tap("chosen", chosen_BTK)
        # Where a choice and a mask are one number, padding chooses the expert after the last, which there is not.
        chosen_BTK = jnp.where(is_real_BT[..., None], chosen_BTK, self.config.num_experts).astype(jnp.int32)
        mixed_BTD, each_BTKD = self.experts(x_BTD, chosen_BTK, scores_BTK)
        tap("expert_outputs", each_BTKD)
        mixed_BTD = tap("experts", mixed_BTD)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            with scope("shared_expert"):
                shared_BTD = self.shared_expert(x_BTD)
            share_BT1 = jax.nn.sigmoid(tap("shared_expert_gate", self.shared_expert_gate.unrounded(x_BTD)))
            mixed_BTD = (mixed_BTD + share_BT1 * shared_BTD).astype(x_BTD.dtype)
        return mixed_BTD, logits_BTE


def route(logits_BTE: jax.Array, experts_per_token: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """The scores and numbers [B, T, K] of each token's experts, the highest first; in at least float32."""
    probabilities_BTE = jax.nn.softmax(logits_BTE.astype(at_least_float32(logits_BTE.dtype)))
    scores_BTK, chosen_BTK = jax.lax.top_k(probabilities_BTE, experts_per_token)
    return scores_BTK / scores_BTK.sum(-1, keepdims=True) if normalize else scores_BTK, chosen_BTK


def load_balancing_loss(router_logits: Sequence[jax.Array], experts_per_token: int, is_real_BT: jax.Array) -> jax.Array:
    """E times the sum over experts of (share of the tokens that chose it) × (mean probability): arXiv:2101.03961, eq. 4-6.

    Both means are over the real tokens of all layers together, as `load_balancing_loss_func` of transformers takes them. K
    when all experts are chosen alike. Only the probabilities have a gradient.
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


# The dimensions of each stack of matrices besides the experts: what comes out, and what goes in.
STACKS: dict[str, tuple[Axes, Axes]] = {
    "gate_up_proj": (("gate_up", "mlp"), ("embed",)),
    "down_proj": (("embed",), ("mlp",)),
}


class Experts(nnx.Module):
    """The experts' weights, stacked: `gate_up_proj` [E, 2, F, D] and `down_proj` [E, D, F]; `lora` has their adapters."""

    def __init__(self, num_experts: int, embed: int, mlp: int, *, dtype: DTypeLike, std: float):
        self.sizes = (("experts", num_experts), ("gate_up", 2), ("mlp", mlp), ("embed", embed))
        self.gate_up_proj = _stack(dict(self.sizes), *STACKS["gate_up_proj"], dtype=dtype, std=std)
        self.down_proj = _stack(dict(self.sizes), *STACKS["down_proj"], dtype=dtype, std=std)
        self.lora: nnx.Dict[Any] = nnx.Dict()
        self.lora_scale = 0.0

    def add_lora(self, stack: str, rank: int, scale: float, *, dtype: DTypeLike) -> None:
        """Give the experts of one stack low-rank adapters, as `Linear.add_lora` does: A [E, R, …] and B [E, …, R]."""
        (out, inp), sizes = STACKS[stack], dict(self.sizes) | {"lora_rank": rank}
        lora_A = _stack(sizes, ("lora_rank",), inp, dtype=dtype, std=(3 * sizes[inp[0]]) ** -0.5)
        lora_B = _stack(sizes, out, ("lora_rank",), dtype=dtype, std=0.0)
        self.lora[stack] = nnx.Dict(lora_A=nnx.Dict(weight=lora_A), lora_B=nnx.Dict(weight=lora_B))
        self.lora_scale = scale

    def __call__(self, x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum of each token's experts, weighed by their scores, [B, T, D]; and each expert's output [B, T, K, D]."""
        arrays = [x_BTD, chosen_BTK, scores_BTK]
        names: list[Axes] = [("batch", "length", axis) for axis in ("embed", "top_k", "top_k")]
        for stack, (out, inp) in STACKS.items():
            arrays, names = [*arrays, getattr(self, stack)[...]], [*names, ("experts", *out, *inp)]
            if stack in self.lora:
                arrays += [self.lora[stack][side]["weight"][...] for side in ("lora_A", "lora_B")]
                names += [("experts", "lora_rank", *inp), ("experts", *out, "lora_rank")]
        mix = functools.partial(_mix, {stack: self.lora_scale for stack in STACKS if stack in self.lora})
        return shard_map_op(mix, arrays, names, (("batch", "length", "embed"), ("batch", "length", "top_k", "embed")))


def _stack(sizes: Mapping[str, int], out: Axes, inp: Axes, *, dtype: DTypeLike, std: float) -> nnx.Param:
    axes = ("experts", *out, *inp)
    shape = tuple(sizes[axis] for axis in axes)
    disk_shape = (shape[0], math.prod(sizes[axis] for axis in out), shape[-1])
    return declare_param(jax.ShapeDtypeStruct(shape, dtype), axes, std=std, disk_shape=disk_shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack_EOI", "lora"], meta_fields=["lora_scale"])
@dataclasses.dataclass(frozen=True)
class Stack:
    """One matrix [O, I] of every expert, and the A [E, R, I] and B [E, O, R] of its adapters, if it has them."""

    stack_EOI: jax.Array
    lora: tuple[jax.Array, jax.Array] | None
    lora_scale: float

    @classmethod
    def take(cls, arrays: list[jax.Array], lora_scale: float | None) -> Stack:
        """The first of these arrays, or the first three, which are taken away."""
        taken = [arrays.pop(0) for _ in range(1 if lora_scale is None else 3)]
        stack, *lora = (x.reshape(len(x), -1, x.shape[-1]) for x in taken)
        return cls(stack, (lora[0], lora[1]) if lora else None, lora_scale or 0.0)

    def __call__(self, rows_RI: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The rows of each expert times its matrix, `grouped_product`."""
        if self.lora is None:
            return grouped_product(rows_RI, self.stack_EOI, sizes_E, dtype)
        exact = at_least_float32(rows_RI.dtype)
        narrow = grouped_product(rows_RI, self.lora[0], sizes_E, rows_RI.dtype)
        added = self.lora_scale * grouped_product(narrow, self.lora[1], sizes_E, exact)
        return (grouped_product(rows_RI, self.stack_EOI, sizes_E, exact) + added).astype(dtype)


def _mix(
    lora_scales: Mapping[str, float],
    parts: LocalShard,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    scores_BTK: jax.Array,
    *stacks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What `Experts` does, on one device: its tokens, which may choose any expert, and its experts."""
    arrays = list(stacks)
    gate_up, down = (Stack.take(arrays, lora_scales.get(name)) for name in STACKS)
    if infers_on_one_cpu() and not lora_scales and native.can_mix(x_BTD, gate_up.stack_EOI, down.stack_EOI):
        return _mix_natively(x_BTD, chosen_BTK, scores_BTK, gate_up, down)
    return _mix_in_xla(parts, x_BTD, chosen_BTK, scores_BTK, gate_up, down)


@jax.custom_vjp
def _mix_natively(
    x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array, gate_up: Stack, down: Stack
) -> tuple[jax.Array, jax.Array]:
    """`_mix_in_xla` by this project's kernel, and with its gradient."""
    return native.mix(x_BTD, chosen_BTK, scores_BTK, gate_up.stack_EOI, down.stack_EOI)


def _natively_forward(*operands: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    return _mix_natively(*operands), operands


def _natively_backward(operands: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    return jax.vjp(functools.partial(_mix_in_xla, LocalShard()), *operands)[1](gradients)


_mix_natively.defvjp(_natively_forward, _natively_backward)


def _mix_in_xla(
    parts: LocalShard, x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array, gate_up: Stack, down: Stack
) -> tuple[jax.Array, jax.Array]:
    """`_mix` by operations of XLA's, which may have gradients, other devices and adapters."""
    x_TD, chosen_R = x_BTD.reshape(-1, x_BTD.shape[-1]), chosen_BTK.reshape(-1)
    num_experts = len(down.stack_EOI) * parts.count("experts")
    run = _run_here if parts.count("experts") == 1 else _run_where_they_are
    each_RD = run(parts, x_TD, chosen_R, gate_up, down)
    each_BTKD = jnp.where(chosen_R[:, None] < num_experts, each_RD, 0).reshape(*chosen_BTK.shape, -1)
    mixed_BTD = jnp.sum(scores_BTK[..., None] * each_BTKD, axis=2)
    # Mixed first and then summed over the parts of the channels: one token travels instead of its K outputs.
    mixed_BTD, each_BTKD = parts.sum(mixed_BTD, "mlp"), parts.sum(each_BTKD, "mlp")
    return mixed_BTD.astype(x_BTD.dtype), each_BTKD.astype(x_BTD.dtype)


def _run_here(parts: LocalShard, x_TD: jax.Array, chosen_R: jax.Array, gate_up: Stack, down: Stack) -> jax.Array:
    """The output [R, D] of expert `chosen_R[r]` for token r // (R / T); nothing where there is no such expert.

    Where the channels are cut, each part's share of the sum, in at least float32.
    """
    exact = at_least_float32(x_TD.dtype)
    order_R = jnp.argsort(chosen_R, stable=True)
    sizes_E = jnp.zeros(len(down.stack_EOI), jnp.int32).at[chosen_R].add(1, mode="drop")
    rows_RD = x_TD[order_R // (len(chosen_R) // len(x_TD))]
    hidden_RO = gate_up(rows_RD, sizes_E, x_TD.dtype if parts.count("embed") == 1 else exact)
    gate_RF, up_RF = jnp.split(parts.sum(hidden_RO, "embed").astype(x_TD.dtype), 2, axis=-1)
    out_RD = down(jax.nn.silu(gate_RF) * up_RF, sizes_E, x_TD.dtype if parts.count("mlp") == 1 else exact)
    return out_RD[jnp.argsort(order_R)]


# --- experts on several devices ---


def room_for(num_tokens: int, experts_per_token: int, num_parts: int, num_local: int) -> int:
    """How many of its tokens' choices a device sends each other in a round: twice the mean, or all that there can be."""
    return min(
        num_tokens * min(experts_per_token, num_local), 8 * -(-2 * num_tokens * experts_per_token // (8 * num_parts))
    )


def _run_where_they_are(parts: LocalShard, x_TD: jax.Array, chosen_R: jax.Array, gate_up: Stack, down: Stack) -> jax.Array:
    """As `_run_here`, for experts on any device: tokens are sent to them, and their outputs back.

    Shapes are static, so a device has room for so many tokens of each other device; what has no room waits for the next
    round. There are as many rounds as the fullest queue needs.
    """
    num_parts, num_local = parts.count("experts"), len(down.stack_EOI)
    owner_R = chosen_R // num_local  # padding belongs to nobody
    queue_P = jnp.zeros(num_parts, jnp.int32).at[owner_R].add(1, mode="drop")
    order_R = jnp.argsort(chosen_R, stable=True)
    room = room_for(len(x_TD), len(chosen_R) // len(x_TD), num_parts, num_local)
    num_rounds = parts.largest(-(-queue_P.max() // room))
    one_round = functools.partial(_one_round, parts, room)
    return _sum_of_rounds(one_round, num_rounds, (chosen_R, order_R, queue_P), (x_TD, gate_up, down))


def _one_round(parts: LocalShard, room: int, number: jax.Array, queues: Any, operands: Any) -> jax.Array:
    """The outputs [R, D] of what is sent in one round; 0 for the rest."""
    chosen_R, order_R, queue_P = queues
    x_TD, gate_up, down = operands
    num_local, num_rows = len(down.stack_EOI), len(chosen_R)
    place_PC = number * room + jnp.arange(room)[None]
    is_sent_PC = place_PC < queue_P[:, None]
    starts_P1 = (jnp.cumsum(queue_P) - queue_P)[:, None]
    row_PC = jnp.where(is_sent_PC, order_R[jnp.minimum(starts_P1 + place_PC, num_rows - 1)], num_rows)
    tokens_PCD = x_TD.at[row_PC // (num_rows // len(x_TD))].get(mode="fill", fill_value=0)
    expert_PC = jnp.where(is_sent_PC, chosen_R.at[row_PC].get(mode="fill", fill_value=0) % num_local, num_local)
    arrived_RD = parts.exchange(tokens_PCD, "experts").reshape(-1, x_TD.shape[1])
    out_RD = _run_here(parts, arrived_RD, parts.exchange(expert_PC, "experts").reshape(-1), gate_up, down)
    returned_PCD = parts.exchange(out_RD.reshape(*row_PC.shape, -1), "experts")
    out = jnp.zeros((num_rows, returned_PCD.shape[-1]), returned_PCD.dtype)
    return out.at[row_PC].set(returned_PCD, mode="drop")


Round = Callable[[jax.Array, Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(one_round: Round, num_rounds: jax.Array, queues: Any, operands: Any) -> jax.Array:
    """one_round(0, …) + … + one_round(num_rounds - 1, …): a loop of dynamic length that has a gradient, by `operands`."""
    shape = jax.eval_shape(one_round, num_rounds, queues, operands)
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(0, num_rounds, lambda number, out: out + one_round(number, queues, operands), zero)


def _rounds_forward(one_round: Round, num_rounds: jax.Array, queues: Any, operands: Any) -> tuple[jax.Array, Any]:
    return _sum_of_rounds(one_round, num_rounds, queues, operands), (num_rounds, queues, operands)


def _rounds_backward(one_round: Round, saved: Any, gradient: jax.Array) -> tuple[Any, Any, Any]:
    """Each round is computed again."""
    num_rounds, queues, operands = saved

    def add(number: jax.Array, sums: Any) -> Any:
        _, pull_back = jax.vjp(lambda given: one_round(number, queues, given), operands)
        return jax.tree.map(jnp.add, sums, pull_back(gradient)[0])

    sums = jax.lax.fori_loop(0, num_rounds, add, jax.tree.map(jnp.zeros_like, operands))
    return _no_gradient(num_rounds), jax.tree.map(_no_gradient, queues), sums


def _no_gradient(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


_sum_of_rounds.defvjp(_rounds_forward, _rounds_backward)
