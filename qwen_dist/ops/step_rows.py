"""The rows of one step of inference, and where their tokens go in the layers' states.

A step has rows of one length: chunks of prompts, or sequences that decode one token. Or it has a group of rows of each
length: then the layers that compute token by token get the tokens of all groups in one array [D, N, …], so that weights
are read once, and those that mix tokens take the groups apart.

Letters: D data-parallel shards, B rows of a group, T tokens of a row, X tokens of a row whose logits are wanted, N tokens
of a shard in all groups, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.ops.paged_cache import MAX_ENTRIES, NOWHERE, PAGE, PageIndices
from qwen_dist.ops.slots import SlotRows

Array = jax.Array | np.ndarray


class StepIndices(NamedTuple):
    """Where the tokens of one step go in the layers' states; prefill, decode and the verification of drafts alike.

    Attributes:
      slots_B: the slot of each row, which is in the row's shard; the number of all slots where the row is padding.
      pages: for each cache group, the pages that rows write and read.
      logit_indices_BX: the tokens of each row whose hidden states are wanted; negative: none. None: all tokens of all rows.
      continues_B: whether a row continues the sequence of the row before it, where a sequence has several rows; these stand
        in order, because a recurrent layer must process them in order. None: no row does.
      saved_slots_B: the slot that gets the states of recurrent layers after a row that the next one continues; the number
        of all slots: none. None: of no row.
    """

    slots_B: Array
    pages: tuple[PageIndices, ...]
    logit_indices_BX: Array | None = None
    continues_B: Array | None = None
    saved_slots_B: Array | None = None


class StepRows(NamedTuple):
    """Rows of a step with the same number of tokens: token ids, positions (negative for padding), and where they go."""

    tokens_BT: jax.Array
    positions_BT: jax.Array
    indices: StepIndices


class RowGroup(NamedTuple):
    """What one layer needs to know of `StepRows`.

    Attributes:
      positions_BT: each token's position; negative for padding.
      slots_B, continues_B, saved_slots_B: see `StepIndices`.
      pages: of the layer's cache group; None where the layer is recurrent.
    """

    positions_BT: jax.Array
    slots_B: jax.Array
    continues_B: jax.Array | None
    saved_slots_B: jax.Array | None
    pages: PageIndices | None = None


def join_groups(rows: Sequence[jax.Array], num_shards: int) -> jax.Array:
    """Return the tokens [B, T, …] of several groups as [D, tokens of a shard, …]; those of one group as they are."""
    if len(rows) == 1:
        return rows[0]
    return jnp.concatenate([x.reshape(num_shards, -1, *x.shape[2:]) for x in rows], axis=1)


def split_groups(x_DN: jax.Array, groups: Sequence[RowGroup]) -> list[jax.Array]:
    """Return each group's rows [B, T, …] of what `join_groups` has made; or [B, X, …] if X tokens of each row are left."""
    if len(groups) == 1:
        return [x_DN]
    shapes = [group.positions_BT.shape for group in groups]
    num_rows, num_tokens = sum(B for B, _ in shapes), sum(B * T for B, T in shapes)
    total = x_DN.shape[0] * x_DN.shape[1]
    counts = [(B, T) if total == num_tokens else (B, total // num_rows) for B, T in shapes]
    ends = np.cumsum([B * T // x_DN.shape[0] for B, T in counts])
    parts = jnp.split(x_DN, ends[:-1], axis=1)
    return [x.reshape(*count, *x.shape[2:]) for x, count in zip(parts, counts, strict=True)]


def logit_indices(steps: Sequence[StepRows], num_shards: int) -> jax.Array | None:
    """Return which tokens' hidden states are wanted, counted in what `join_groups` makes of several groups of rows."""
    of_rows = [None if x.logit_indices_BX is None else jnp.asarray(x.logit_indices_BX) for *_, x in steps]
    if len(of_rows) == 1:
        return of_rows[0]
    wanted, before = [], 0
    for (_, positions_BT, _), index_BX in zip(steps, of_rows, strict=True):
        assert index_BX is not None, "a step with several groups of rows returns only the tokens that are wanted"
        rows, num_tokens = len(positions_BT) // num_shards, positions_BT.shape[1]
        first_B = before + jnp.tile(jnp.arange(rows) * num_tokens, num_shards)
        wanted.append(jnp.where(index_BX < 0, -1, first_B[:, None] + index_BX))
        before += rows * num_tokens
    return join_groups(wanted, num_shards)


def row_groups(
    steps: Sequence[StepRows], cache_group: int | None, num_shards: int
) -> tuple[tuple[RowGroup, ...], jax.Array | None]:
    """Return the groups of rows as the layers of a cache group see them, and the page of each token.

    `cache_group` is None for the layers without a cache, whose tokens have no page.
    """
    groups, pages_of_tokens = [], []
    for _, positions_BT, indices in steps:
        continues_B, saved_slots_B = (
            None if x is None else jnp.asarray(x) for x in (indices.continues_B, indices.saved_slots_B)
        )
        pages = None if cache_group is None else indices.pages[cache_group]
        groups.append(RowGroup(positions_BT, jnp.asarray(indices.slots_B), continues_B, saved_slots_B, pages))
        if pages is not None:
            pages_of_tokens.append(page_of_tokens(pages, positions_BT))
    return tuple(groups), join_groups(pages_of_tokens, num_shards) if pages_of_tokens else None


def page_of_tokens(pages: PageIndices, positions_BT: jax.Array) -> jax.Array:
    """Return the page that each token is written to, int32 [B, T]; negative for padding."""
    column_BT = jnp.clip(positions_BT // PAGE - pages.first_page_B[:, None], 0, pages.write_BN.shape[1] - 1)
    return jnp.where(positions_BT < 0, -1, jnp.take_along_axis(jnp.asarray(pages.write_BN), column_BT, axis=1))


def slot_rows(group: RowGroup) -> SlotRows:
    """Return where the rows of a group have their slots; a row whose first position is 0 starts a sequence."""
    return SlotRows(group.slots_B, group.positions_BT[:, 0] == 0, group.continues_B, group.saved_slots_B)


def indices_in_order(num_cache_groups: int, positions_BT: jax.Array, num_shards: int, pages_per_row: int) -> StepIndices:
    """Return the plainest allocation: row b has slot b and `pages_per_row` consecutive pages of every cache group."""
    num_rows, rows = len(positions_BT), len(positions_BT) // num_shards
    write_BN = (jnp.arange(num_rows) % rows)[:, None] * pages_per_row + jnp.arange(pages_per_row)
    num_entries = rows * pages_per_row
    missing = -num_entries % MAX_ENTRIES
    page_E = jnp.pad(jnp.arange(num_entries), (0, missing))
    start_E = jnp.pad(page_E[:num_entries] % pages_per_row * PAGE, (0, missing), constant_values=NOWHERE)
    row_DE, page_DE, start_DE = (jnp.tile(x, (num_shards, 1)) for x in (page_E // pages_per_row, page_E, start_E))
    pages = PageIndices(write_BN, jnp.zeros(num_rows, jnp.int32), row_DE, page_DE, start_DE, jnp.int32(num_entries))
    return StepIndices(jnp.arange(num_rows), (pages,) * num_cache_groups)
