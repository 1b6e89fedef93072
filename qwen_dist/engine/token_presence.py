"""Which tokens each slot has met, in its prompt and its answer, for the repetition penalty.

The table is sharded over slots and vocabulary, as logits are, and each device changes and reads its own shard. Left to
itself XLA gathers the whole table to change a few elements.

Letters: M slots, V vocab, B rows, T tokens of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.sharding import LocalShard, constrain, shard_map_op

AXES = ("batch", "vocab")
# Chunks of prompts: every device has their whole length.
CHUNKS = ("batch", "kv_length")


def empty(num_slots: int, vocab_size: int) -> jax.Array:
    """Return the table bool [M, V] in which no slot has met any token."""
    return constrain(jnp.zeros((num_slots, vocab_size), bool), *AXES)


def add_chunks(table_MV: jax.Array, slots_B: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Add chunks of prompts; a slot whose chunk starts at position 0 is cleared before.

    Args:
      table_MV: the table.
      slots_B: in the same shard of the batch as the chunk; M where the row is padding.
      tokens_BT: token ids.
      positions_BT: negative for padding.
    """

    def local(shard: LocalShard, table_MV: jax.Array, *chunks: jax.Array) -> tuple[jax.Array]:
        (slots_B, tokens_BT), positions_BT = _local_indices(shard, table_MV, *chunks[:2]), chunks[2]
        nowhere = len(table_MV)
        starting_B = jnp.where(positions_BT[:, 0] == 0, slots_B, nowhere)
        slot_BT = jnp.where(positions_BT >= 0, slots_B[:, None], nowhere)
        return (table_MV.at[starting_B].set(False, mode="drop").at[slot_BT, tokens_BT].set(True, mode="drop"),)

    return shard_map_op(local, [table_MV, slots_B, tokens_BT, positions_BT], [AXES, AXES[:1], CHUNKS, CHUNKS], [AXES])[0]


def add_tokens(table_MV: jax.Array, slots_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Add one token of each of these slots; slots as in `add_chunks`."""

    def local(shard: LocalShard, table_MV: jax.Array, slots_B: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array]:
        return (table_MV.at[_local_indices(shard, table_MV, slots_B, tokens_B)].set(True, mode="drop"),)

    return shard_map_op(local, [table_MV, slots_B, tokens_B], [AXES, AXES[:1], AXES[:1]], [AXES])[0]


def of_slots(table_MV: jax.Array, slots_B: jax.Array) -> jax.Array:
    """Return which tokens these slots have met, [B, V]; slots as in `add_chunks`, undefined for padding."""

    def local(shard: LocalShard, table_MV: jax.Array, slots_B: jax.Array) -> tuple[jax.Array]:
        return (table_MV.at[_local_indices(shard, table_MV, slots_B, slots_B)[0]].get(mode="clip"),)

    return shard_map_op(local, [table_MV, slots_B], [AXES, AXES[:1]], [AXES])[0]


def _local_indices(
    shard: LocalShard, table_MV: jax.Array, slots: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return slots and tokens as indices of this device's shard of the table; its size for those outside."""

    def inside(index: jax.Array, axis: str, size: int) -> jax.Array:
        local = index - shard.offset(axis, size)
        return jnp.where((local >= 0) & (local < size), local, size)

    return inside(slots, AXES[0], table_MV.shape[0]), inside(tokens, AXES[1], table_MV.shape[1])
