"""Pages of the cache as the host counts them: how many a sequence needs, and who has which. No jax.

Layers that see equally far back are of one kind and share a table of pages; each kind has a pool of its own. Where layers
see a window only, a sequence has as many pages as the window and a step's tokens span, and goes round in them: page number
n of its positions lies where n - ring did, which no query sees any more. A pool is as large as its sequences can need, so
that a kind with a small window never runs out before the kind that sees everything does.

A recurrent state would be one more kind: one that needs a single page a sequence, whatever its length.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping

import numpy as np

# How far back layers see (None: everything), and how many layers do.
Kinds = Mapping[int | None, int]


class Needs:
    """How many pages a sequence, and a pool for `num_rows` of them, can need of each kind.

    Args:
      kinds: of layers, in the order in which numbers of pages are given.
      num_rows: sequences at a time.
      page_size: positions of a page.
      max_length: positions that a sequence can have.
      ahead: tokens that a sequence goes on by in one step, at most.
    """

    def __init__(self, kinds: Kinds, *, num_rows: int, page_size: int, max_length: int, ahead: int):
        self.windows, self._layers = tuple(kinds), tuple(kinds.values())
        self._num_rows, self._page_size = num_rows, page_size
        whole = -(-max_length // page_size)
        self.rings = tuple(whole if w is None else min(whole, self._spanned(w + ahead - 1)) for w in self.windows)

    def _spanned(self, num_positions: int) -> int:
        """Pages that so many positions lie on, wherever they begin."""
        return -(-(num_positions - 1) // self._page_size) + 1

    def of_sequence(self, num_positions: int) -> tuple[int, ...]:
        """Pages of each kind that a sequence of so many positions has."""
        return tuple(min(-(-num_positions // self._page_size), ring) for ring in self.rings)

    def of_pools(self, num_pages: int) -> tuple[int, ...]:
        """Pages of each kind for sequences that would have `num_pages` of them if all layers saw everything."""
        return tuple(min(num_pages, self._num_rows * ring) for ring in self.rings)

    def largest(self, num_pages: int) -> int:
        """The most that `of_pools` may be asked for with memory for so many pages in every layer."""

        def taken(number: int) -> int:
            return sum(layers * pages for layers, pages in zip(self._layers, self.of_pools(number), strict=True))

        candidates = range(1, self._num_rows * max(self.rings) + 1)
        return bisect.bisect_right(candidates, num_pages * sum(self._layers), key=taken)


class Pool:
    """The pages of one kind in a part of the mesh: `owner` has the row of each, `place` which of the row's pages it is."""

    def __init__(self, window: int | None, ring: int, page_size: int):
        self._window, self._ring, self._page_size = window, ring, page_size
        self.free: list[int] = []
        self.owner, self.place = np.zeros(0, np.int32), np.zeros(0, np.int32)

    def grow(self, num_pages: int) -> None:
        more = num_pages - len(self.owner)
        for page in range(len(self.owner), num_pages):
            heapq.heappush(self.free, page)
        self.owner = np.concatenate([self.owner, np.full(more, -1, np.int32)])
        self.place = np.concatenate([self.place, np.zeros(more, np.int32)])

    def extend(self, pages: list[int], number: int, row: int) -> None:
        """Give a row more pages, up to `number` of them."""
        for place in range(len(pages), number):
            page = heapq.heappop(self.free)
            self.owner[page], self.place[page] = row, place
            pages.append(page)

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.owner[page] = -1
            heapq.heappush(self.free, page)
        pages.clear()

    def page_at(self, pages: list[int], number: int) -> int:
        """Which of a row's pages its page number `number` is."""
        return pages[number % self._ring]

    def num_live(self, num_positions: int) -> int:
        """Of the positions of a sequence, those that are still seen."""
        return num_positions if self._window is None else min(num_positions, self._window)

    def seen_from(self, position: int) -> int:
        """The number of the first page that the query at a position looks at."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self._page_size

    def held(self, first_R: np.ndarray, last_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pages that rows look at from page number `first_R` up to `last_R`, and the number of each in its row.

        A row that is not to look has no pages: its `last_R` is less than its `first_R`.
        """
        last_P = last_R[self.owner]
        number_P = last_P - (last_P - self.place) % self._ring
        page = np.flatnonzero((self.owner >= 0) & (number_P >= first_R[self.owner])).astype(np.int32)
        return page, number_P[page]
