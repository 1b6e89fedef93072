"""One step as arrays: the record that runner and model take, built from a schedule. No jax.

Letters: D data-parallel shards, B rows of a step (B / D in each shard), T tokens of a row, X = 1 token of a row whose
logits are wanted, N pages that a row writes to, E entries (a row reading a page).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qwen_dist.engine.page_allocator import CacheLimits
from qwen_dist.engine.scheduler import Schedule, ScheduledTokens
from qwen_dist.engine.sequence import Sequence

# In place of a token: the one that was sampled last in the row's slot, which only the devices know.
LAST_SAMPLED = -1
# The first position of an entry that fills up: after every query.
NOWHERE = 2**30


class PageArrays(NamedTuple):
    """`ops.paged_cache.PageIndices` of one cache group, on the host."""

    write_BN: np.ndarray
    first_page_B: np.ndarray
    row_DE: np.ndarray
    page_DE: np.ndarray
    start_DE: np.ndarray
    num_entries: np.ndarray


class Batch(NamedTuple):
    """One step: chunks of prompts, one a row, or one token of each decoding sequence.

    Attributes:
      tokens_BT: token ids, or LAST_SAMPLED; 0 for padding.
      positions_BT: of the tokens; negative for padding.
      next_tokens_BT: the token after each, for scoring a prompt; 0 where it is not known.
      slots_B: the slot of each row; the number of all slots where the row is padding.
      continues_B: whether a row continues the sequence of the row before it. Rows of one sequence stand in order.
      saved_slots_B: the slot for the recurrent layers' states after a row that another continues; the number of all slots:
        none. None in decode, and for models that have no snapshots.
      logit_indices_BX: the token of each row after which one is sampled; negative where there is none.
      num_steps: how many tokens to decode, one after the other; 1 for prefill.
      pages: for each cache group.
      sequences: of each row, for the host; None for padding.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    next_tokens_BT: np.ndarray
    slots_B: np.ndarray
    continues_B: np.ndarray
    saved_slots_B: np.ndarray | None
    logit_indices_BX: np.ndarray
    num_steps: int
    pages: tuple[PageArrays, ...]
    sequences: list[Sequence | None]

    @property
    def is_prefill(self) -> bool:
        return self.tokens_BT.shape[1] > 1


# Chunks of prompts, or rows that decode; or both, for a step that computes them together.
StepBatches = tuple[Batch] | tuple[Batch, Batch]


class BatchBuilder:
    """Lays a schedule out in arrays of few sizes, because each size is a program to compile.

    In a step with chunks of prompts decoding rows are always for all slots: each other number would be one more program.

    Args:
      limits: of the scheduler.
      num_slots: sequences at a time in all shards.
      num_shards: data-parallel shards; the rows of a shard are together.
      chunk_size: tokens of a row of prefill.
      max_chunks: rows of prefill in each shard.
      entry_multiple: E is a multiple of it.
      for_latency: somebody waits for each prompt, so there is one size more of prefill, to pad short prompts less. So it is
        with one or two slots, where prompts mostly come alone.
      has_snapshots: states of recurrent layers are saved within prompts. If all slots are in use, prefill ends a step where
        it saves them, so there is one size more, for the page of tokens that may follow.
    """

    def __init__(
        self,
        limits: CacheLimits,
        *,
        num_slots: int,
        num_shards: int,
        chunk_size: int,
        max_chunks: int,
        entry_multiple: int,
        for_latency: bool = False,
        has_snapshots: bool = False,
    ):
        self._limits, self._num_slots, self._num_shards = limits, num_slots, num_shards
        self._chunk_size, self._entry_multiple, self._has_snapshots = chunk_size, entry_multiple, has_snapshots
        widths = {max(1, max_chunks >> halvings) for halvings in range(4 if for_latency or num_slots <= 2 else 3)}
        if has_snapshots:
            widths.add(limits.page_size // chunk_size)
        self._prefill_widths = sorted(widths)
        self._decode_widths = _decode_widths(num_slots // num_shards)

    def build(self, schedule: Schedule, num_pages: tuple[int, ...]) -> StepBatches:
        """Return the arrays of a schedule; `num_pages` are those of each cache group in each shard."""
        chunks = [chunk for scheduled in schedule if scheduled.is_prefill for chunk in self._cut(scheduled)]
        decoding = [scheduled for scheduled in schedule if not scheduled.is_prefill]
        if not chunks:
            return (self._decode(self._by_shard(decoding), num_pages),)
        prefill = self._prefill(self._by_shard(chunks), num_pages)
        if not decoding:
            return (prefill,)
        return prefill, self._decode(self._by_shard(decoding), num_pages, self._decode_widths[-1])

    def empty_batches(self, num_pages: tuple[int, ...]) -> Iterator[StepBatches]:
        """Yield batches without sequences for each program, that is for each number of rows of prefill and of decode."""
        nothing: list[Schedule] = [[] for _ in range(self._num_shards)]
        for width in self._prefill_widths:
            yield (self._prefill(nothing, num_pages, width),)
        for width in self._decode_widths:
            yield (self._decode(nothing, num_pages, width),)
        for width in self._prefill_widths:
            yield self._prefill(nothing, num_pages, width), self._decode(nothing, num_pages, self._decode_widths[-1])

    def _by_shard(self, rows: Any) -> list[Schedule]:
        by_shard: list[Schedule] = [[] for _ in range(self._num_shards)]
        for row in rows:
            by_shard[row.sequence.shard].append(row)
        return by_shard

    def _cut(self, scheduled: ScheduledTokens) -> Schedule:
        """Cut the tokens of a prompt into rows; each starts at a multiple of the chunk size, so it is within one page.

        States are saved at the ends of rows, because pages are multiples of chunks.
        """
        sequence, start, num_tokens, *_ = scheduled
        saved = {states.end: (states,) for states in scheduled.saved}
        rows = []
        for first in range(start, start + num_tokens, self._chunk_size):
            end = min(first + self._chunk_size, start + num_tokens)
            rows.append(ScheduledTokens(sequence, first, end - first, saved=saved.get(end, ())))
        return rows

    def _prefill(self, rows: list[Schedule], num_pages: tuple[int, ...], least: int = 1) -> Batch:
        width = next(width for width in self._prefill_widths if width >= max(least, *map(len, rows)))
        batch = self._empty(width, self._chunk_size, num_steps=1)
        for b, (sequence, start, num_tokens, _, saved) in _placed(rows, width):
            tokens = sequence.tokens[start : start + num_tokens]
            batch.tokens_BT[b, :num_tokens] = tokens
            batch.positions_BT[b, :num_tokens] = range(start, start + num_tokens)
            following = sequence.tokens[start + 1 : start + 1 + self._chunk_size]
            batch.next_tokens_BT[b, : len(following)] = following
            batch.slots_B[b], batch.sequences[b] = sequence.slot, sequence
            batch.continues_B[b] = b % width > 0 and batch.sequences[b - 1] is sequence
            if saved:
                assert batch.saved_slots_B is not None
                batch.saved_slots_B[b] = saved[0].slot
            if start + num_tokens == sequence.num_prefill_tokens:
                batch.logit_indices_BX[b] = num_tokens - 1
        # A row reads at most a ring of pages, or all that the shard has.
        capacity = [width * min(ring, pages) for ring, pages in zip(self._limits.ring_pages, num_pages, strict=True)]
        return batch._replace(pages=self._pages(rows, width, 1, capacity))

    def _decode(self, rows: list[Schedule], num_pages: tuple[int, ...], least: int = 1) -> Batch:
        width = next(width for width in self._decode_widths if width >= max(least, *map(len, rows)))
        batch = self._empty(width, 1, num_steps=max((row.num_tokens for shard in rows for row in shard), default=1))
        for shard, of_shard in enumerate(rows):
            part = slice(shard * width, shard * width + len(of_shard))
            batch.tokens_BT[part], batch.logit_indices_BX[part] = LAST_SAMPLED, 0
            batch.positions_BT[part, 0] = [row.start for row in of_shard]
            batch.slots_B[part] = [row.sequence.slot for row in of_shard]
            batch.sequences[part] = [row.sequence for row in of_shard]
        return batch._replace(pages=self._pages(rows, width, 2, self._decode_capacity(rows, num_pages)))

    def _decode_capacity(self, rows: list[Schedule], num_pages: tuple[int, ...]) -> list[int]:
        """Return how many entries of each group there is room for: one for each page, more where rows share pages."""

        def of_group(group: int, capacity: int) -> int:
            page_size, ring = self._limits.page_size, self._limits.ring_pages[group]
            needed = (sum(min((row.start + row.num_tokens - 1) // page_size + 1, ring) for row in shard) for shard in rows)
            most = max(needed)
            while capacity < most:
                capacity *= 4
            return capacity

        return list(map(of_group, range(len(num_pages)), num_pages))

    def _empty(self, width: int, num_tokens: int, num_steps: int) -> Batch:
        total = width * self._num_shards
        tokens_BT, next_tokens_BT = np.zeros((2, total, num_tokens), np.int32)
        return Batch(
            tokens_BT,
            positions_BT=np.full((total, num_tokens), -1, np.int32),
            next_tokens_BT=next_tokens_BT,
            slots_B=np.full(total, self._num_slots, np.int32),
            continues_B=np.zeros(total, bool),
            saved_slots_B=np.full(total, self._num_slots, np.int32) if self._has_snapshots and num_tokens > 1 else None,
            logit_indices_BX=np.full((total, 1), -1, np.int32),
            num_steps=num_steps,
            pages=(),
            sequences=[None] * total,
        )

    # --- pages ---

    def _pages(self, rows: list[Schedule], width: int, num_written: int, capacity: Any) -> tuple[PageArrays, ...]:
        """Return for each group the pages that rows write (N = `num_written`), and the entries that they read."""
        arrays = []
        for group, size in enumerate(capacity):
            write_BN = np.zeros((width * len(rows), num_written), np.int32)
            first_page_B = np.zeros(width * len(rows), np.int32)
            entries = []
            for shard, of_shard in enumerate(rows):
                part = slice(shard * width, shard * width + len(of_shard))
                first_page_B[part], write_BN[part], of_rows = self._pages_of_rows(group, of_shard, num_written)
                entries.append(of_rows)
            arrays.append(PageArrays(write_BN, first_page_B, *self._padded(entries, size)))
        return tuple(arrays)

    def _pages_of_rows(self, group: int, rows: Schedule, num_written: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """Return of a shard's rows the first page that each writes, the pages, and the entries that they read.

        Entries are rows, pages and their first positions: those of a prompt's chunk in the order of its positions, those of
        decode in the order of the pages in memory, so that neighbours are read together.
        """
        page_size = self._limits.page_size
        start_B = np.array([row.start for row in rows], np.int64)
        last_B = (start_B + np.array([row.num_tokens for row in rows], np.int64) - 1) // page_size
        first_B, visible_B = start_B // page_size, self._limits.first_visible_page(group, start_B)
        tables = [row.sequence.page_tables[group] for row in rows]
        pages = [table.pages(*ends) for table, *ends in zip(tables, visible_B.tolist(), last_B.tolist(), strict=True)]
        page_E = np.concatenate([np.zeros(0, np.int32), *pages])
        count_B = last_B - visible_B + 1
        end_B = np.cumsum(count_B)
        # A row's entries end with the pages that it writes.
        write_BN = page_E[np.stack([end_B - 1 - last_B + first_B, end_B - 1][-num_written:], axis=1)]
        row_E = np.repeat(np.arange(len(rows), dtype=np.int32), count_B)
        number_E = np.arange(len(row_E)) - np.repeat(end_B - count_B - visible_B, count_B)
        entries = row_E, page_E, (number_E * page_size).astype(np.int32)
        if num_written > 1:
            order_E = np.argsort(page_E, kind="stable")
            entries = row_E[order_E], page_E[order_E], entries[2][order_E]
        return first_B, write_BN, entries

    def _padded(self, entries: list[tuple[np.ndarray, ...]], capacity: int) -> tuple[np.ndarray, ...]:
        shape = (len(entries), -(-capacity // self._entry_multiple) * self._entry_multiple)
        row_DE, page_DE, start_DE = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, NOWHERE, np.int32)
        for shard, columns in enumerate(entries):
            for array, column in zip((row_DE, page_DE, start_DE), columns, strict=True):
                array[shard, : len(column)] = column
        return row_DE, page_DE, start_DE, np.array(max(len(row) for row, *_ in entries), np.int32)


def _placed(rows: list[Schedule], width: int) -> Any:
    """Yield each row with its index: the rows of shard n start at n · width."""
    for shard, of_shard in enumerate(rows):
        for index, row in enumerate(of_shard):
            yield shard * width + index, row


def _decode_widths(num_slots: int) -> list[int]:
    """Return how many rows decode together: a number of quarters of all slots, or one row."""
    return sorted({1, *(-(-num_slots * quarters // 4) for quarters in range(1, 5))})
