"""Experts on several devices: tokens travel to their experts, and the outputs back, by all-to-all.

Letters: T tokens, K experts of a token, R = T·K choices, D embed, P devices along `experts`, C capacity of a round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.ops.weight import QuantizedWeight
from qwen_dist.sharding import LocalShard

# (tokens [R, D], expert of each [R], gate_up, down) → outputs [R, D], on one device.
Local = Callable[[jax.Array, jax.Array, Any, Any], jax.Array]


def expert_capacity(num_tokens: int, experts_per_token: int, num_devices: int, num_local: int) -> int:
    """Return how many choices a device sends to each other device in a round: twice the mean, or all that are possible."""
    return min(
        num_tokens * min(experts_per_token, num_local), 8 * -(-2 * num_tokens * experts_per_token // (8 * num_devices))
    )


def expert_parallel(
    shard: LocalShard, x_TD: jax.Array, chosen_R: jax.Array, gate_up: Any, down: Any, local: Local
) -> jax.Array:
    """Return the output [R, D] of expert `chosen_R[r]`, on any device, for token r // K.

    Shapes are static, so a device receives at most `expert_capacity` tokens from each other device in a round; the others
    wait for the next. There are as many rounds as the longest queue needs, so no token is dropped.
    """
    num_devices, num_local = shard.num_shards("experts"), len(down)
    owner_R = chosen_R // num_local  # the owner of padding is out of range
    queue_P = jnp.zeros(num_devices, jnp.int32).at[owner_R].add(1, mode="drop")
    order_R = jnp.argsort(chosen_R, stable=True)
    capacity = expert_capacity(len(x_TD), len(chosen_R) // len(x_TD), num_devices, num_local)
    num_rounds = shard.pmax(-(-queue_P.max() // capacity))
    one_round = functools.partial(_one_round, shard, capacity, local)
    return _sum_of_rounds(one_round, num_rounds, (chosen_R, order_R, queue_P), (x_TD, gate_up, down))


def _one_round(shard: LocalShard, capacity: int, local: Local, number: jax.Array, queues: Any, operands: Any) -> jax.Array:
    """Return the outputs [R, D] of the tokens that are sent in one round, and 0 for the others."""
    chosen_R, order_R, queue_P = queues
    x_TD, gate_up, down = operands
    num_local, num_rows = len(down), len(chosen_R)
    index_PC = number * capacity + jnp.arange(capacity)[None]
    is_sent_PC = index_PC < queue_P[:, None]
    starts_P1 = (jnp.cumsum(queue_P) - queue_P)[:, None]
    row_PC = jnp.where(is_sent_PC, order_R[jnp.minimum(starts_P1 + index_PC, num_rows - 1)], num_rows)
    tokens_PCD = x_TD.at[row_PC // (num_rows // len(x_TD))].get(mode="fill", fill_value=0)
    expert_PC = jnp.where(is_sent_PC, chosen_R.at[row_PC].get(mode="fill", fill_value=0) % num_local, num_local)
    arrived_RD = shard.all_to_all(tokens_PCD, "experts").reshape(-1, x_TD.shape[1])
    out_RD = local(arrived_RD, shard.all_to_all(expert_PC, "experts").reshape(-1), gate_up, down)
    returned_PCD = shard.all_to_all(out_RD.reshape(*row_PC.shape, -1), "experts")
    out = jnp.zeros((num_rows, returned_PCD.shape[-1]), returned_PCD.dtype)
    return out.at[row_PC].set(returned_PCD, mode="drop")


Round = Callable[[jax.Array, Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_rounds(one_round: Round, num_rounds: jax.Array, queues: Any, operands: Any) -> jax.Array:
    """Return one_round(0, …) + … + one_round(num_rounds - 1, …): a loop of dynamic length with a gradient by `operands`."""
    shape = jax.eval_shape(one_round, num_rounds, queues, operands)
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(0, num_rounds, lambda number, out: out + one_round(number, queues, operands), zero)


def _rounds_forward(one_round: Round, num_rounds: jax.Array, queues: Any, operands: Any) -> tuple[jax.Array, Any]:
    return _sum_of_rounds(one_round, num_rounds, queues, operands), (num_rounds, queues, operands)


def _rounds_backward(one_round: Round, saved: Any, gradient: jax.Array) -> tuple[Any, Any, Any]:
    """Recompute each round. Quantised weights have no gradient."""
    num_rounds, queues, operands = saved
    parts, structure = jax.tree.flatten(operands, is_leaf=lambda part: isinstance(part, QuantizedWeight))
    arrays = [part if isinstance(part, jax.Array) else None for part in parts]

    def with_arrays(given: list[Any]) -> Any:
        return jax.tree.unflatten(structure, [part if x is None else x for x, part in zip(given, parts, strict=True)])

    def add(number: jax.Array, sums: Any) -> Any:
        _, pull_back = jax.vjp(lambda given: one_round(number, queues, with_arrays(given)), arrays)
        return jax.tree.map(jnp.add, sums, pull_back(gradient)[0])

    sums = jax.lax.fori_loop(0, num_rounds, add, jax.tree.map(jnp.zeros_like, arrays))
    return _no_gradient(num_rounds), jax.tree.map(_no_gradient, queues), jax.tree.unflatten(structure, sums)


def _no_gradient(x: jax.Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


_sum_of_rounds.defvjp(_rounds_forward, _rounds_backward)
