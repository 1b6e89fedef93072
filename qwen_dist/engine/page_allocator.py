"""Pages of the layers' states, as the host counts them: how many a sequence needs, and which are free. No jax.

Each cache group (layers that keep the same positions) has its own pool of pages in each data-parallel shard, and each
sequence a page table for each group. Layers with a window use a ring of pages, as large as the window and one step's tokens
need. A pool is never larger than its slots can need, so a group with a small window does not run out before the group that
keeps everything. Recurrent layers need no pages: their state is in the sequence's slot.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PagedGroup(NamedTuple):
    """A cache group in numbers: positions that its layers look back (None: all), and bytes of a page in all of them."""

    window: int | None
    num_layers: int
    page_bytes: int


class CacheLimits:
    """How many pages of each cache group a sequence, and a pool for `num_slots` sequences, can need.

    Args:
      groups: the order in which numbers of pages are given.
      num_slots: sequences at a time in one shard.
      page_size: positions of a page.
      max_length: positions that a sequence can have.
      max_step_tokens: tokens of one sequence in one step, at most.
    """

    def __init__(
        self, groups: Sequence[PagedGroup], *, num_slots: int, page_size: int, max_length: int, max_step_tokens: int
    ):
        self.groups, self.page_size = tuple(groups), page_size
        self._num_slots = num_slots
        self._whole = -(-max_length // page_size)
        self.ring_pages = tuple(
            self._whole if group.window is None else min(self._whole, self._spanned(group.window + max_step_tokens - 1))
            for group in groups
        )

    def _spanned(self, num_positions: int) -> int:
        """Return how many pages this many consecutive positions touch, wherever they begin."""
        return -(-(num_positions - 1) // self.page_size) + 1

    def of_sequence(self, num_positions: int) -> tuple[int, ...]:
        """Return the pages of each group for a sequence of this many positions."""
        return tuple(min(-(-num_positions // self.page_size), ring) for ring in self.ring_pages)

    def of_pools(self, num_pages: int) -> tuple[int, ...]:
        """Return the pages of each group for sequences that need `num_pages` in a group without a window."""
        return tuple(min(num_pages, self._num_slots * ring) for ring in self.ring_pages)

    def largest(self, cache_bytes: int) -> int:
        """Return the largest argument of `of_pools` whose pages fit into this many bytes."""

        def needed(num_pages: int) -> int:
            return sum(group.page_bytes * pages for group, pages in zip(self.groups, self.of_pools(num_pages), strict=True))

        candidates = range(1, self._num_slots * max(self.ring_pages, default=self._whole) + 1)
        return bisect.bisect_right(candidates, cache_bytes, key=needed)

    def first_visible_page(self, group: int, positions: np.ndarray) -> np.ndarray:
        """Return the number of the first page that the query at each position sees."""
        window = self.groups[group].window
        return np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1) // self.page_size

    def num_live(self, group: int, num_positions: int) -> int:
        """Return how many positions of a sequence its queries can still see."""
        window = self.groups[group].window
        return num_positions if window is None else min(num_positions, window)


class PageAllocator:
    """The pages of one cache group in one shard. A page may be in several page tables: it has a reference count."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._reference_counts: list[int] = []

    @property
    def num_pages(self) -> int:
        return len(self._reference_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, num_pages: int) -> None:
        """Add free pages, up to `num_pages` in all."""
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._free, page)
            self._reference_counts.append(0)

    def allocate(self) -> int:
        """Return the lowest free page, with one reference to it."""
        page = heapq.heappop(self._free)
        self._reference_counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a reference to an allocated page, for one more page table that has it."""
        assert self._reference_counts[page] > 0, f"page {page} is free"
        self._reference_counts[page] += 1

    def free(self, page: int) -> None:
        """Drop one reference; without references the page is free."""
        assert self._reference_counts[page] > 0, f"page {page} is free already"
        self._reference_counts[page] -= 1
        if self._reference_counts[page] == 0:
            heapq.heappush(self._free, page)
