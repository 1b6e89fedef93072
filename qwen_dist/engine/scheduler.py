"""Who is read or continued next, and where in the cache: rows, pages and the steps of the devices. No jax.

A sequence gets a row (its place in the state on the devices) and pages of the cache as it grows. Its prompt is read in
blocks of tokens, which other prompts' blocks fill up to a whole piece; then it is continued together with all others
that have been read. Rows and pages of a sequence that ends go to the next one at once. When pages run out, the sequence
that came last gives its own back, and is read again, answer so far included, once there is room. How many pages there are,
and which are whose, is counted by kind of layer in `engine.pages`.

The batch may be split over several parts of the mesh: each part has rows and pages of its own.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qwen_dist.engine.pages import Kinds, Needs, Pool
from qwen_dist.engine.request import Request

# Where a page starts that nobody may see.
NOWHERE = 2**30


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request while it is being answered.

    Attributes:
      tokens: the prompt and the answer so far.
      end: the last position that a token may have.
      part, row: where it is on the devices; row is -1 while it waits.
      pages: of each kind its pages, by their numbers in the part, in order.
      num_read: the tokens to read before it can be continued.
      num_planned: positions whose keys and values are in the cache once all that was planned has run.
      is_over: whether it has been released for good.
    """

    request: Request
    tokens: list[int]
    end: int
    part: int = 0
    row: int = -1
    pages: list[list[int]] = dataclasses.field(default_factory=list)
    num_read: int = 0
    num_planned: int = 0
    is_over: bool = False

    @property
    def is_reading(self) -> bool:
        return self.num_planned < self.num_read

    @property
    def can_continue(self) -> bool:
        return self.num_read <= self.num_planned < self.end


class Visits(NamedTuple):
    """Which pages the rows of each part look at, [D, E] each; see `models.cache.Pages`."""

    row_DE: np.ndarray
    page_DE: np.ndarray
    start_DE: np.ndarray
    num_visits: np.ndarray


class Table(NamedTuple):
    """Pages of one kind: tokens of row b go to `pages_BN[b]`, one after the other, and look at those of `visits`."""

    pages_BN: np.ndarray
    visits: Visits


class Piece(NamedTuple):
    """Blocks of prompts to read, B = D × blocks of each part.

    tokens_BT, positions_BT: a block of tokens; behind the end of a prompt the position is -1.
    next_BT: the token that follows each of them; 0 where none is known.
    rows_B: whose they are; the number of all rows where there is no block.
    last_B: the index of a prompt's last token, -1 in blocks where it does not end.
    tables: for each kind of layers, the page that each block is written to and the pages that it looks at.
    sequences: who each block is of.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    next_BT: np.ndarray
    rows_B: np.ndarray
    last_B: np.ndarray
    tables: tuple[Table, ...]
    sequences: list[Sequence | None]


class Steps(NamedTuple):
    """Up to `num_steps` more tokens for each of B = D × n rows.

    rows_B: as for `Piece`; tables, first_B: its tokens go to two pages of each kind, the first of which is the sequence's
    page number `first_B`.
    """

    rows_B: np.ndarray
    first_B: np.ndarray
    tables: tuple[Table, ...]
    num_steps: int
    sequences: list[Sequence | None]


class Scheduler:
    """Plans one step after the other; deterministic, so that several processes plan alike.

    Args:
      num_rows: sequences at a time, a multiple of `parts`.
      page_size: positions of a page.
      block_size: tokens of a block; a page is some of them.
      max_pages: for how many pages in every layer each part has memory; there are few at first.
      max_length: positions that a sequence can have.
      kinds: how far back layers see, and how many layers do.
      parts: over how many parts of the mesh the batch is split.
      num_blocks: blocks of a piece in each part.
      num_steps: tokens of a row in one go, at most a page.
      group: sizes of visits are rounded up to a multiple of this.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        page_size: int,
        block_size: int,
        max_pages: int,
        max_length: int,
        kinds: Kinds,
        parts: int = 1,
        num_blocks: int = 16,
        num_steps: int = 1,
        group: int = 1,
    ):
        assert num_rows % parts == 0 and page_size % block_size == 0 and 1 <= num_steps <= page_size
        ahead = max(num_blocks * block_size, num_steps)
        rows = num_rows // parts
        self._needs = Needs(kinds, num_rows=rows, page_size=page_size, max_length=max_length, ahead=ahead)
        self.num_rows, self.max_pages = num_rows, self._needs.largest(max_pages)
        self.num_preempted = 0
        self._page_size, self._block_size, self._group = page_size, block_size, group
        self._num_blocks, self._num_steps = num_blocks, num_steps
        # Few sizes, because each is a program to compile; but one prompt that somebody waits for is padded to little.
        self._piece_sizes = sorted({max(1, num_blocks >> halvings) for halvings in range(4 if num_rows == 1 else 3)})
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._arrivals = itertools.count()
        self._parts = [_Part(range(n * rows, (n + 1) * rows), self._needs, page_size) for n in range(parts)]
        self._allowed_pages = 0
        self._row_sizes = _sizes(rows)
        self._has_just_read = False

    # --- what is there ---

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each kind that each part has now."""
        return self._needs.of_pools(self._allowed_pages)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(part.sequences) for part in self._parts)

    @property
    def num_held_pages(self) -> tuple[int, ...]:
        """Pages of each kind that sequences have, in all parts."""
        pools = zip(*(part.pools for part in self._parts), strict=True)
        return tuple(sum(len(pool.owner) - len(pool.free) for pool in of_kind) for of_kind in pools)

    @property
    def num_live(self) -> tuple[int, ...]:
        """Positions in the cache of each kind that hold what may still be looked at."""
        lengths = [sequence.num_planned for part in self._parts for sequence in part.sequences]
        return tuple(sum(map(pool.num_live, lengths)) for pool in self._parts[0].pools)

    # --- what the engine says ---

    def fits(self, num_positions: int) -> bool:
        """Whether a sequence of so many positions can ever be answered."""
        needed, most = self._needs.of_sequence(num_positions), self._needs.of_pools(self.max_pages)
        return all(number <= there for number, there in zip(needed, most, strict=True))

    def add(self, request: Request, end: int) -> Sequence:
        """Let a request wait for its turn; longer prompts come first. `end`: the last position that a token may have."""
        sequence = Sequence(request, list(request.prompt), end)
        heapq.heappush(self._waiting, (-len(request.prompt), next(self._arrivals), sequence))
        return sequence

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended or is no longer wanted: its row and its pages are free."""
        sequence.is_over = True
        if sequence.row < 0:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)
        else:
            self._parts[sequence.part].give_back(sequence)

    def plan(self, *, can_preempt: bool) -> Piece | Steps | None:
        """What to do next; None when that depends on results still to come, or there is nothing to do.

        can_preempt: nothing is in flight, so that every sequence's tokens are known.
        """
        self._admit()
        reading = [[s for s in part.sequences if s.is_reading] for part in self._parts]
        ready = [[s for s in part.sequences if s.can_continue] for part in self._parts]
        num_reading, num_ready = sum(map(len, reading)), sum(map(len, ready))
        # Mostly in turn; but a batch is filled before few of its rows are continued for long.
        if num_reading and (not self._has_just_read or num_ready < num_reading):
            self._has_just_read = True
            return self._piece(reading)
        self._has_just_read = False
        if not num_ready:
            return None
        steps = min(self._num_steps, max(s.end - s.num_planned for part in ready for s in part))
        if not self._make_room(ready, steps, can_preempt):
            return None
        return self._steps([[s for s in part if s.row >= 0] for part in ready], steps)

    # --- how it decides ---

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0][2]
            part = max(self._parts, key=lambda part: (bool(part.free_rows), len(part.pools[0].free)))
            # Together with the first position of the answer, so that it can at least begin.
            needed = self._needs.of_sequence(min(len(sequence.tokens), sequence.end - 1) + 1)
            if not part.free_rows or not self._find_pages(part, needed):
                return
            heapq.heappop(self._waiting)
            sequence.part, sequence.num_planned, sequence.num_read = self._parts.index(part), 0, len(sequence.tokens)
            part.take(sequence, needed)

    def _find_pages(self, part: _Part, missing: tuple[int, ...]) -> bool:
        """Whether a part has so many free pages of each kind, after letting all parts grow if they may."""
        while any(len(pool.free) < number for pool, number in zip(part.pools, missing, strict=True)):
            if self._allowed_pages == self.max_pages:
                return False
            more = max(2 * self._allowed_pages, 4 * self.num_rows // len(self._parts), 16)
            self._allowed_pages = min(more, self.max_pages)
            for one in self._parts:
                one.grow(self.num_pages)
        return True

    def _make_room(self, ready: list[list[Sequence]], steps: int, can_preempt: bool) -> bool:
        """Give every row the pages of its next steps, if need be by taking those of the last to come."""
        for part, sequences in zip(self._parts, ready, strict=True):
            for sequence in sequences:
                after = self._planned_after(sequence, steps)
                if (after - 1) // self._page_size == (sequence.num_planned - 1) // self._page_size:
                    continue  # most steps need no other page than the one before
                needed = self._needs.of_sequence(after)
                while sequence.row >= 0 and any(missing := part.missing(sequence, needed)):
                    if self._find_pages(part, missing):
                        part.extend(sequence, needed)
                    elif can_preempt:
                        self._preempt(part.sequences[-1])
                    else:
                        return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._parts[sequence.part].give_back(sequence)
        sequence.num_read = sequence.num_planned = 0
        # Before all that have never begun.
        heapq.heappush(self._waiting, (-(10**9) - len(sequence.tokens), next(self._arrivals), sequence))
        self.num_preempted += 1

    # --- what it says, as arrays ---

    def _piece(self, reading: list[list[Sequence]]) -> Piece:
        size = self._block_size
        blocks = [list(itertools.islice(self._blocks(part), self._num_blocks)) for part in reading]
        most = max(map(len, blocks))
        width = next(width for width in self._piece_sizes if width >= most)
        total = width * len(blocks)
        tokens_BT, positions_BT = np.zeros((total, size), np.int32), np.full((total, size), -1, np.int32)
        next_BT = np.zeros((total, size), np.int32)
        rows_B, last_B = np.full(total, self.num_rows, np.int32), np.full(total, -1, np.int32)
        sequences = list[Sequence | None]([None] * total)
        for part, of_part in enumerate(blocks):
            for index, (sequence, start) in enumerate(of_part):
                b = part * width + index
                tokens = sequence.tokens[start : min(start + size, sequence.num_read)]
                tokens_BT[b, : len(tokens)] = tokens
                positions_BT[b, : len(tokens)] = range(start, start + len(tokens))
                following = sequence.tokens[start + 1 : start + 1 + size]
                next_BT[b, : len(following)] = following
                rows_B[b], sequences[b] = sequence.row, sequence
                sequence.num_planned = start + len(tokens)
                if sequence.num_planned == sequence.num_read:
                    last_B[b] = len(tokens) - 1
        tables = tuple(self._table_of_piece(kind, blocks, width) for kind in range(len(self.num_pages)))
        return Piece(tokens_BT, positions_BT, next_BT, rows_B, last_B, tables, sequences)

    def _table_of_piece(self, kind: int, blocks: list[list[tuple[Sequence, int]]], width: int) -> Table:
        """The blocks of each part by their sequences and first positions."""
        size = self._page_size
        pages_BN, columns = np.full((width * len(blocks), 1), -1, np.int32), []
        for n, (of_part, part) in enumerate(zip(blocks, self._parts, strict=True)):
            pool, seen = part.pools[kind], []
            for b, (sequence, start) in enumerate(of_part):
                pages, last = sequence.pages[kind], start // size
                pages_BN[n * width + b] = pool.page_at(pages, last)
                numbers = range(pool.seen_from(start), last + 1)
                seen += [(b, pool.page_at(pages, number), number * size) for number in numbers]
            index, page, first = np.array(seen, np.int32).reshape(-1, 3).T
            columns.append((index, page, first))
        capacity = width * min(self._needs.rings[kind], self.num_pages[kind])
        return Table(pages_BN, self._visits(columns, capacity))

    def _blocks(self, reading: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        for sequence in reading:
            for start in range(sequence.num_planned, sequence.num_read, self._block_size):
                yield sequence, start

    def _steps(self, ready: list[list[Sequence]], steps: int) -> Steps:
        size = self._page_size
        most = max(map(len, ready))
        width = next(width for width in self._row_sizes if width >= most)
        total = width * len(ready)
        rows_B, first_B = np.full(total, self.num_rows, np.int32), np.zeros(total, np.int32)
        sequences = list[Sequence | None]([None] * total)
        tables = tuple(self._table_of_steps(kind, ready, width, steps) for kind in range(len(self.num_pages)))
        for part, of_part in enumerate(ready):
            for index, sequence in enumerate(of_part):
                b = part * width + index
                rows_B[b], first_B[b], sequences[b] = sequence.row, sequence.num_planned // size, sequence
                sequence.num_planned = self._planned_after(sequence, steps)
        return Steps(rows_B, first_B, tables, steps, sequences)

    def _planned_after(self, sequence: Sequence, steps: int) -> int:
        return min(sequence.num_planned + steps, sequence.end)

    def _table_of_steps(self, kind: int, ready: list[list[Sequence]], width: int, steps: int) -> Table:
        size = self._page_size
        pages_BN, columns = np.zeros((width * len(ready), 2), np.int32), []
        for n, (of_part, part) in enumerate(zip(ready, self._parts, strict=True)):
            pool = part.pools[kind]
            index_R, first_R = np.zeros(self.num_rows, np.int32), np.zeros(self.num_rows, np.int32)
            last_R = np.full(self.num_rows, -1, np.int32)
            for index, sequence in enumerate(of_part):
                row, pages, start = sequence.row, sequence.pages[kind], sequence.num_planned
                last = (self._planned_after(sequence, steps) - 1) // size
                pages_BN[n * width + index] = pool.page_at(pages, start // size), pool.page_at(pages, last)
                index_R[row], first_R[row], last_R[row] = index, pool.seen_from(start), last
            page, number = pool.held(first_R, last_R)
            columns.append((index_R[pool.owner[page]], page, number * size))
        return Table(pages_BN, self._visits(columns, self.num_pages[kind]))

    def _visits(self, columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]], capacity: int) -> Visits:
        shape = (len(columns), -(-capacity // self._group) * self._group)
        row_DE, page_DE, start_DE = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, NOWHERE, np.int32)
        for part, (row, page, start) in enumerate(columns):
            row_DE[part, : len(row)], page_DE[part, : len(row)], start_DE[part, : len(row)] = row, page, start
        return Visits(row_DE, page_DE, start_DE, np.array(max(len(row) for row, _, _ in columns), np.int32))


class _Part:
    """Rows of one part of the mesh, and a pool of pages of each kind."""

    def __init__(self, rows: range, needs: Needs, page_size: int):
        self.free_rows = list(rows)
        self.pools = [Pool(window, ring, page_size) for window, ring in zip(needs.windows, needs.rings, strict=True)]
        self.sequences: list[Sequence] = []  # in the order of their coming

    def grow(self, num_pages: tuple[int, ...]) -> None:
        for pool, number in zip(self.pools, num_pages, strict=True):
            pool.grow(number)

    def take(self, sequence: Sequence, num_pages: tuple[int, ...]) -> None:
        sequence.row = heapq.heappop(self.free_rows)
        sequence.pages = [[] for _ in self.pools]
        self.sequences.append(sequence)
        self.extend(sequence, num_pages)

    def missing(self, sequence: Sequence, num_pages: tuple[int, ...]) -> tuple[int, ...]:
        """How many pages of each kind the sequence lacks to have so many."""
        return tuple(max(0, number - len(pages)) for number, pages in zip(num_pages, sequence.pages, strict=True))

    def extend(self, sequence: Sequence, num_pages: tuple[int, ...]) -> None:
        """Up to so many pages of each kind."""
        for pool, pages, number in zip(self.pools, sequence.pages, num_pages, strict=True):
            pool.extend(pages, number, sequence.row)

    def give_back(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        heapq.heappush(self.free_rows, sequence.row)
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.give_back(pages)
        sequence.row = -1


def _sizes(rows: int) -> list[int]:
    """Rows that are continued together: as many quarters of all as it takes, or one; each size is a program to compile."""
    return sorted({1, *(-(-rows * quarters // 4) for quarters in range(1, 5))})
