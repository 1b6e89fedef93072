"""Which tokens each row has met, in its prompt and its answer: a table, cut over rows and vocabulary as logits are.

Each device changes and reads its own part of it. Left to itself the compiler gathers all of it to change a few elements.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.sharding import LocalShard, constrain, shard_map_op

AXES = ("batch", "vocab")
# Of blocks of tokens: every device has their whole length.
BLOCKS = ("batch", "kv_length")


def empty(num_rows: int, vocab_size: int) -> jax.Array:
    """Bool [R, V]: nobody has met anything."""
    return constrain(jnp.zeros((num_rows, vocab_size), bool), *AXES)


def read(seen_RV: jax.Array, rows_B: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The table after blocks of prompts; a row that begins in one has met nothing before.

    `rows_B` are in the same part of the batch as the block, or no rows: R. Negative positions are padding.
    """

    def here(parts: LocalShard, seen_RV: jax.Array, *blocks: jax.Array) -> tuple[jax.Array]:
        (rows_B, tokens_BT), positions_BT = _of_part(parts, seen_RV, *blocks[:2]), blocks[2]
        none = len(seen_RV)
        begins_B = jnp.where(positions_BT[:, 0] == 0, rows_B, none)
        row_BT = jnp.where(positions_BT >= 0, rows_B[:, None], none)
        return (seen_RV.at[begins_B].set(False, mode="drop").at[row_BT, tokens_BT].set(True, mode="drop"),)

    return shard_map_op(here, [seen_RV, rows_B, tokens_BT, positions_BT], [AXES, AXES[:1], BLOCKS, BLOCKS], [AXES])[0]


def add(seen_RV: jax.Array, rows_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """The table after one more token of each of these rows; rows as in `read`."""

    def here(parts: LocalShard, seen_RV: jax.Array, rows_B: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array]:
        return (seen_RV.at[_of_part(parts, seen_RV, rows_B, tokens_B)].set(True, mode="drop"),)

    return shard_map_op(here, [seen_RV, rows_B, tokens_B], [AXES, AXES[:1], AXES[:1]], [AXES])[0]


def of_rows(seen_RV: jax.Array, rows_B: jax.Array) -> jax.Array:
    """What these rows have met, [B, V]; rows as in `read`, where there is none anything."""

    def here(parts: LocalShard, seen_RV: jax.Array, rows_B: jax.Array) -> tuple[jax.Array]:
        return (seen_RV.at[_of_part(parts, seen_RV, rows_B, rows_B)[0]].get(mode="clip"),)

    return shard_map_op(here, [seen_RV, rows_B], [AXES, AXES[:1]], [AXES])[0]


def _of_part(parts: LocalShard, seen_RV: jax.Array, rows: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows and tokens as they are counted in this device's part of the table; its own size for those outside."""

    def inside(index: jax.Array, axis: str, size: int) -> jax.Array:
        local = index - parts.first(axis, size)
        return jnp.where((local >= 0) & (local < size), local, size)

    return inside(rows, AXES[0], seen_RV.shape[0]), inside(tokens, AXES[1], seen_RV.shape[1])
