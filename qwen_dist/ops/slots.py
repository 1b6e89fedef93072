"""States of fixed size in slots: rows of a step read their slot's state, and write it back.

Letters: D data-parallel shards, M slots of a shard, B rows of a step, each in the shard of its slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = Any
Body = Callable[[Tree, Tree], tuple[Tree, Tree]]


class SlotRows(NamedTuple):
    """Where the rows of a step have their states.

    Attributes:
      slots_B: the slot of each row among those of all shards; their number where the row is padding.
      is_start_B: the row starts a sequence, from the initial state.
      continues_B: the row continues the sequence of the row before it; None: no row does.
      saved_slots_B: the slot that gets the state after a row that the next one continues; the number of all slots: none.
        Other rows write to their own slot in any case. None: no such state is saved.
    """

    slots_B: jax.Array
    is_start_B: jax.Array
    continues_B: jax.Array | None = None
    saved_slots_B: jax.Array | None = None


def gather(pool_DM: jax.Array, rows: SlotRows, initial: float = 0.0, dtype: DTypeLike | None = None) -> jax.Array:
    """Return each row's state [B, …] before the step: of its slot, or the initial value.

    `dtype` is that of the states, where the pool has the bits of 16-bit floats; see `paged_cache.PagedState`.
    """
    local_DB, _ = _local_slots(pool_DM.shape, rows)
    found_DB = jax.vmap(lambda pool_M, slot_B: pool_M.at[slot_B].get(mode="clip"))(pool_DM, local_DB)
    found_B = found_DB.reshape(-1, *found_DB.shape[2:]).view(dtype or pool_DM.dtype)
    return jnp.where(_expand(rows.is_start_B, found_B.ndim), jnp.asarray(initial, found_B.dtype), found_B)


def scatter(pool_DM: jax.Array, rows: SlotRows, new_B: jax.Array) -> jax.Array:
    """Put states after rows into the slots: after the last row of each sequence, and after those with a `saved_slots_B`.

    They have the pool's dtype, or the pool has their bits.
    """
    _, written_DB = _local_slots(pool_DM.shape, rows)
    new_DB = new_B.view(pool_DM.dtype).reshape(len(pool_DM), -1, *new_B.shape[1:])
    return jax.vmap(lambda pool_M, slot_B, x_B: pool_M.at[slot_B].set(x_B, mode="drop"))(pool_DM, written_DB, new_DB)


def copy(source_DM: jax.Array, target_DN: jax.Array, from_D: jax.Array, to_D: jax.Array) -> jax.Array:
    """Return the target with one state of each shard copied to it from the source, or none where the numbers are too large.

    The states of each pool are numbered through all shards, as slots are.
    """
    x_D = gather(source_DM, SlotRows(from_D, jnp.zeros(from_D.shape, bool)))
    return scatter(target_DN, SlotRows(to_D, jnp.zeros(to_D.shape, bool)), x_D)


def in_turn(x: jax.Array, pools: Tree) -> tuple[jax.Array, Tree]:
    """Return the same values, which exist together: before a layer reads its pools, and after it has written them.

    Otherwise XLA may gather the states of all layers first and scatter them last, and keep them all meanwhile.
    """
    return jax.lax.optimization_barrier((x, pools))


def recur(pools: Tree, rows: SlotRows, initial: Tree, inputs_B: Tree, body: Body) -> tuple[Tree, Tree]:
    """Run a recurrence over the rows, each from its state, the rows of one sequence one after the other.

    Args:
      pools: a pytree of arrays [D, M, …].
      rows: of the step.
      initial: the same pytree of the values of a sequence's start.
      inputs_B: a pytree of arrays [B, …].
      body: (states, inputs) → (states, output), of one row; padding inside a row must leave the states unchanged.

    Returns:
      The pools, and the outputs [B, …].
    """
    if rows.continues_B is None:
        states = jax.tree.map(lambda pool, value: gather(pool, rows, value), pools, initial)
        states, outputs_B = jax.vmap(body)(states, inputs_B)
        return jax.tree.map(lambda pool, x_B: scatter(pool, rows, x_B), pools, states), outputs_B
    _, written_DB = _local_slots(jax.tree.leaves(pools)[0].shape, rows)
    # All rows read before the first one writes: XLA copies a pool that a loop both reads and writes.
    start_B = jax.tree.map(lambda pool, value: gather(pool, rows, value), pools, initial)
    of_rows = jax.tree.map(lambda x: x.reshape(*written_DB.shape, *x.shape[1:]), (rows.continues_B, start_B, inputs_B))

    def shard(pools_M: Tree, written_B: jax.Array, of_rows_B: Tree) -> tuple[Tree, Tree]:
        def row(carry: Tree, one: Tree) -> tuple[Tree, Tree]:
            before, pools_M = carry
            written, (continues, start, inputs) = one
            start = jax.tree.map(lambda x, y: jnp.where(continues, x, y), before, start)
            after, output = body(start, inputs)
            after = jax.tree.map(lambda x, pool_M: x.astype(pool_M.dtype), after, pools_M)
            pools_M = jax.tree.map(lambda pool_M, x: pool_M.at[written].set(x, mode="drop"), pools_M, after)
            return (after, pools_M), output

        nothing = jax.tree.map(lambda pool_M: jnp.zeros(pool_M.shape[1:], pool_M.dtype), pools_M)
        (_, pools_M), outputs_B = jax.lax.scan(row, (nothing, pools_M), (written_B, of_rows_B))
        return pools_M, outputs_B

    pools, outputs_DB = jax.vmap(shard)(pools, written_DB, of_rows)
    return pools, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs_DB)


def written_slots(rows: SlotRows, num_slots: int) -> jax.Array:
    """Return the slot that the state after each row is written to, of a single shard's; out of range: none."""
    return _local_slots((1, num_slots), rows)[1][0]


def _local_slots(pool_shape: tuple[int, ...], rows: SlotRows) -> tuple[jax.Array, jax.Array]:
    """Return the slot of each row within its shard [D, B / D], to read and to write; out of range: nowhere."""
    num_shards, num_slots = pool_shape[:2]

    def local(slots_B: jax.Array) -> jax.Array:
        return slots_B.reshape(num_shards, -1) - jnp.arange(num_shards)[:, None] * num_slots

    read_DB = local(rows.slots_B)
    if rows.continues_B is None:
        return read_DB, read_DB
    is_followed_B = jnp.concatenate([rows.continues_B[1:], jnp.zeros(1, bool)])
    saved_DB = num_slots if rows.saved_slots_B is None else local(rows.saved_slots_B)
    return read_DB, jnp.where(is_followed_B.reshape(num_shards, -1), saved_DB, read_DB)


def _expand(x_B: jax.Array, ndim: int) -> jax.Array:
    return x_B.reshape(-1, *(1,) * (ndim - 1))
