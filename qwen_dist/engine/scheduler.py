"""Who is read or continued next, and where in the cache: rows, pages and the steps of the devices. No jax.

A sequence gets a row (its place in the state on the devices) and pages of the cache as it grows. Its prompt is read in
blocks of tokens, which other prompts' blocks fill up to a whole piece; then it is continued together with all others
that have been read. Rows and pages of a sequence that ends go to the next one at once. When pages run out, the sequence
that came last gives its own back, and is read again, answer so far included, once there is room.

The batch may be split over several parts of the mesh: each part has rows and pages of its own.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

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
      pages: its pages, by their numbers in the part, in order.
      num_read: the tokens to read before it can be continued.
      num_planned: positions whose keys and values are in the cache once all that was planned has run.
      is_over: whether it has been released for good.
    """

    request: Request
    tokens: list[int]
    end: int
    part: int = 0
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
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


class Piece(NamedTuple):
    """Blocks of prompts to read, B = D × blocks of each part.

    tokens_BT, positions_BT: a block of tokens; behind the end of a prompt the position is -1.
    next_BT: the token that follows each of them; 0 where none is known.
    rows_B: whose they are; the number of all rows where there is no block.
    pages_B: the page that each is written to, in its part.
    last_B: the index of a prompt's last token, -1 in blocks where it does not end.
    sequences: who each block is of.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    next_BT: np.ndarray
    rows_B: np.ndarray
    pages_B: np.ndarray
    last_B: np.ndarray
    visits: Visits
    sequences: list[Sequence | None]


class Steps(NamedTuple):
    """Up to `num_steps` more tokens for each of B = D × n rows.

    rows_B: as for `Piece`; first_B, pages_BN: its tokens go to the pages `pages_BN`, the first of which is the sequence's
    page number `first_B`.
    """

    rows_B: np.ndarray
    first_B: np.ndarray
    pages_BN: np.ndarray
    num_steps: int
    visits: Visits
    sequences: list[Sequence | None]


class Scheduler:
    """Plans one step after the other; deterministic, so that several processes plan alike.

    Args:
      num_rows: sequences at a time, a multiple of `parts`.
      page_size: positions of a page.
      block_size: tokens of a block; a page is some of them.
      max_pages: pages that each part may grow to; there are few at first.
      max_length: positions that a sequence can have.
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
        parts: int = 1,
        num_blocks: int = 16,
        num_steps: int = 1,
        group: int = 1,
    ):
        assert num_rows % parts == 0 and page_size % block_size == 0 and 1 <= num_steps <= page_size
        self.num_rows, self.max_pages = num_rows, max_pages
        self.num_preempted = 0
        self._page_size, self._block_size, self._group = page_size, block_size, group
        self._num_blocks, self._num_steps = num_blocks, num_steps
        # Few sizes, because each is a program to compile; but one prompt that somebody waits for is padded to little.
        self._piece_sizes = sorted({max(1, num_blocks >> halvings) for halvings in range(4 if num_rows == 1 else 3)})
        self._max_sequence_pages = self._pages_for(max_length)
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._arrivals = itertools.count()
        rows = num_rows // parts
        self._parts = [_Part(range(part * rows, (part + 1) * rows)) for part in range(parts)]
        self._row_sizes = _sizes(rows)
        self._has_just_read = False

    # --- what is there ---

    @property
    def num_pages(self) -> int:
        """Pages that each part has now."""
        return len(self._parts[0].owner)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(part.sequences) for part in self._parts)

    @property
    def num_held_pages(self) -> int:
        return sum(len(part.owner) - len(part.free_pages) for part in self._parts)

    @property
    def num_live(self) -> int:
        """Positions in the cache that hold something."""
        return sum(sequence.num_planned for part in self._parts for sequence in part.sequences)

    # --- what the engine says ---

    def fits(self, num_positions: int) -> bool:
        """Whether a sequence of so many positions can ever be answered."""
        return self._pages_for(num_positions) <= self.max_pages

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

    def _pages_for(self, num_positions: int) -> int:
        return -(-num_positions // self._page_size)

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0][2]
            part = max(self._parts, key=lambda part: (bool(part.free_rows), len(part.free_pages)))
            # Together with the first position of the answer, so that it can at least begin.
            needed = self._pages_for(min(len(sequence.tokens), sequence.end - 1) + 1)
            if not part.free_rows or not self._find_pages(part, needed):
                return
            heapq.heappop(self._waiting)
            sequence.part, sequence.num_planned, sequence.num_read = self._parts.index(part), 0, len(sequence.tokens)
            part.take(sequence, needed, self._page_size)

    def _find_pages(self, part: _Part, number: int) -> bool:
        """Whether a part has so many free pages, after letting all parts grow if they may."""
        while len(part.free_pages) < number:
            if self.num_pages == self.max_pages:
                return False
            target = min(max(2 * self.num_pages, 4 * self.num_rows // len(self._parts), 16), self.max_pages)
            for one in self._parts:
                one.grow(target)
        return True

    def _make_room(self, ready: list[list[Sequence]], steps: int, can_preempt: bool) -> bool:
        """Give every row the pages of its next steps, if need be by taking those of the last to come."""
        for part, sequences in zip(self._parts, ready, strict=True):
            for sequence in sequences:
                last = min(sequence.num_planned + steps, sequence.end) - 1
                while sequence.row >= 0 and (missing := last // self._page_size + 1 - len(sequence.pages)) > 0:
                    if self._find_pages(part, missing):
                        part.extend(sequence, missing, self._page_size)
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
        size, page_size = self._block_size, self._page_size
        blocks = [list(itertools.islice(self._blocks(part), self._num_blocks)) for part in reading]
        most = max(map(len, blocks))
        width = next(width for width in self._piece_sizes if width >= most)
        total = width * len(blocks)
        tokens_BT, positions_BT = np.zeros((total, size), np.int32), np.full((total, size), -1, np.int32)
        next_BT = np.zeros((total, size), np.int32)
        rows_B, pages_B = np.full(total, self.num_rows, np.int32), np.full(total, -1, np.int32)
        last_B, sequences = np.full(total, -1, np.int32), list[Sequence | None]([None] * total)
        seen: list[list[tuple[int, int, int]]] = [[] for _ in blocks]
        for part, of_part in enumerate(blocks):
            for index, (sequence, start) in enumerate(of_part[:width]):
                b = part * width + index
                tokens = sequence.tokens[start : min(start + size, sequence.num_read)]
                tokens_BT[b, : len(tokens)] = tokens
                positions_BT[b, : len(tokens)] = range(start, start + len(tokens))
                following = sequence.tokens[start + 1 : start + 1 + size]
                next_BT[b, : len(following)] = following
                rows_B[b], pages_B[b], sequences[b] = sequence.row, sequence.pages[start // page_size], sequence
                visited = sequence.pages[: start // page_size + 1]
                seen[part] += [(index, page, n * page_size) for n, page in enumerate(visited)]
                sequence.num_planned = start + len(tokens)
                if sequence.num_planned == sequence.num_read:
                    last_B[b] = len(tokens) - 1
        capacity = width * min(self._max_sequence_pages, self.num_pages)
        columns = [np.array(visits, np.int32).reshape(-1, 3).T for visits in seen]
        visits = self._visits([(row, page, start) for row, page, start in columns], capacity)
        return Piece(tokens_BT, positions_BT, next_BT, rows_B, pages_B, last_B, visits, sequences)

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
        pages_BN, sequences = np.zeros((total, 2), np.int32), list[Sequence | None]([None] * total)
        columns = []
        for part, (of_part, state) in enumerate(zip(ready, self._parts, strict=True)):
            order = np.full(self.num_rows, -1, np.int32)
            for index, sequence in enumerate(of_part):
                b, first = part * width + index, sequence.num_planned // size
                rows_B[b], first_B[b], sequences[b] = sequence.row, first, sequence
                ahead = sequence.pages[first : first + 2]
                pages_BN[b, : len(ahead)] = ahead
                order[sequence.row] = index
                sequence.num_planned = min(sequence.num_planned + steps, sequence.end)
            row_P = np.where(state.owner >= 0, order[state.owner], -1)
            page = np.flatnonzero(row_P >= 0).astype(np.int32)
            columns.append((row_P[page], page, state.start[page]))
        return Steps(rows_B, first_B, pages_BN, steps, self._visits(columns, self.num_pages), sequences)

    def _visits(self, columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]], capacity: int) -> Visits:
        shape = (len(columns), -(-capacity // self._group) * self._group)
        row_DE, page_DE, start_DE = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, NOWHERE, np.int32)
        for part, (row, page, start) in enumerate(columns):
            row_DE[part, : len(row)], page_DE[part, : len(row)], start_DE[part, : len(row)] = row, page, start
        return Visits(row_DE, page_DE, start_DE, np.array(max(len(row) for row, _, _ in columns), np.int32))


class _Part:
    """Rows and pages of one part of the mesh; `owner` and `start` say which row has each page and its first position."""

    def __init__(self, rows: range):
        self.free_rows, self.free_pages = list(rows), list[int]()
        self.sequences: list[Sequence] = []  # in the order of their coming
        self.owner, self.start = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def grow(self, num_pages: int) -> None:
        more = num_pages - len(self.owner)
        for page in range(len(self.owner), num_pages):
            heapq.heappush(self.free_pages, page)
        self.owner = np.concatenate([self.owner, np.full(more, -1, np.int32)])
        self.start = np.concatenate([self.start, np.zeros(more, np.int32)])

    def take(self, sequence: Sequence, num_pages: int, page_size: int) -> None:
        sequence.row = heapq.heappop(self.free_rows)
        self.sequences.append(sequence)
        self.extend(sequence, num_pages, page_size)

    def extend(self, sequence: Sequence, num_pages: int, page_size: int) -> None:
        for _ in range(num_pages):
            page = heapq.heappop(self.free_pages)
            self.owner[page], self.start[page] = sequence.row, len(sequence.pages) * page_size
            sequence.pages.append(page)

    def give_back(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        heapq.heappush(self.free_rows, sequence.row)
        for page in sequence.pages:
            self.owner[page] = -1
            heapq.heappush(self.free_pages, page)
        sequence.row = -1
        sequence.pages.clear()


def _sizes(rows: int) -> list[int]:
    """Rows that are continued together: as many quarters of all as it takes, or one; each size is a program to compile."""
    return sorted({1, *(-(-rows * quarters // 4) for quarters in range(1, 5))})
