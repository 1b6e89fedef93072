"""Pages of the layers' states, as the host counts them: how many a sequence needs, and which are free. No jax.

Each cache group (layers that keep the same positions) has its own pool of pages in each data-parallel shard, and each
sequence a page table for each group. Layers with a window use a ring of pages, as large as the window and one step's tokens
need. A pool is never larger than its slots can need, so a group with a small window does not run out before the group that
keeps everything. Recurrent layers need no pages: their state is in the sequence's slot.

The prefix cache: a page whose tokens are known has a name, the hash of its tokens and of all tokens before them. It keeps
its content after the last sequence has left it, until the page is needed, and a sequence that begins with the same tokens
takes it as it is. Recurrent layers also need their state as it was after the last of these pages: a snapshot.
"""

from __future__ import annotations

import bisect
import collections
import heapq
from collections.abc import Iterable, Sequence
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

    @property
    def can_share(self) -> bool:
        """Whether a page may belong to several sequences. The pages of a ring are written again, so they may not."""
        return bool(self.groups) and all(group.window is None for group in self.groups)

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
    """The pages of one cache group in one shard.

    A page is held, by one page table or several (it has a reference count); or it is free. A free page with a name is
    cached: it can be held again as it is, and is given away only when there is no other, the least recently used first.
    """

    def __init__(self) -> None:
        self._unnamed: list[int] = []  # a heap of the free pages without a name
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._reference_counts: list[int] = []
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._reused: set[int] = set()

    @property
    def num_pages(self) -> int:
        return len(self._reference_counts)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, cached ones included."""
        return len(self._unnamed) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_shared(self) -> int:
        """References to pages beyond the first one of each."""
        return sum(self._reference_counts) - self.num_pages + self.num_free

    def has(self, number: int, *, without_reused: bool = False) -> bool:
        """Return whether this many pages can be allocated; maybe without losing a page that was useful in the cache.

        It was useful if it has been held again; that is asked of the page only that would be lost first.
        """
        if self.num_free < number:
            return False
        is_lost = len(self._unnamed) < number
        return not (without_reused and is_lost and next(iter(self._cached)) in self._reused)

    def grow(self, num_pages: int) -> None:
        """Add free pages, up to `num_pages` in all."""
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._unnamed, page)
            self._reference_counts.append(0)

    def allocate(self) -> int:
        """Return a free page, with one reference to it: the lowest without a name, or the least recently used."""
        if self._unnamed:
            page = heapq.heappop(self._unnamed)
        else:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
        self._reference_counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a reference to a page that is held or cached, for one more page table that has it."""
        assert self._reference_counts[page] > 0 or page in self._cached, f"page {page} is free"
        self._cached.pop(page, None)
        self._reused.add(page)
        self._reference_counts[page] += 1

    def free(self, page: int) -> None:
        """Drop one reference; without references the page is free, or cached if it has a name."""
        assert self._reference_counts[page] > 0, f"page {page} is free already"
        self._reference_counts[page] -= 1
        if self._reference_counts[page] > 0:
            return
        if page in self._names:
            self._cached[page] = None
        else:
            self._reused.discard(page)
            heapq.heappush(self._unnamed, page)

    # --- names ---

    def name(self, page: int, name: bytes) -> bool:
        """Name a page that is held. Return False if it has a name, or another page has this one."""
        assert self._reference_counts[page] > 0, f"page {page} is free"
        if page in self._names or name in self._pages:
            return False
        self._names[page], self._pages[name] = name, page
        return True

    def forget(self, page: int) -> None:
        """Take the name from a page that is not cached, as its content is not, or no longer, what the name says."""
        assert page not in self._cached
        self._reused.discard(page)
        del self._pages[self._names.pop(page)]

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the pages with these names, up to the first that no page has."""
        pages = []
        for name in names:
            if (page := self._pages.get(name)) is None:
                break
            pages.append(page)
        return pages


class SnapshotPool:
    """Copies of the recurrent states of one shard, each as it was after the page that it is named after.

    A snapshot is promised from the admission of the sequence that is going to compute it until the step is scheduled after
    which it is copied. It is held while it is promised, and while a sequence waits that begins from it; of the others, the
    least recently used is given away first.
    """

    def __init__(self, num_snapshots: int):
        self._unnamed = list(range(num_snapshots))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._holds = [0] * num_snapshots
        self._names: dict[int, bytes] = {}
        self._snapshots: dict[bytes, int] = {}
        self._promised: set[int] = set()
        self._of_this_step: set[int] = set()

    def find(self, names: Sequence[bytes]) -> tuple[int, int]:
        """Return after how many of these pages there is a snapshot, at most, and the snapshot; or 0 and -1."""
        for number in range(len(names), 0, -1):
            if (snapshot := self._snapshots.get(names[number - 1])) is not None:
                return number, snapshot
        return 0, -1

    def promise(self, name: bytes) -> int:
        """Return a snapshot that a sequence is going to compute, held; -1 if there is one of this name, or none to give."""
        if name in self._snapshots or not (self._unnamed or self._idle):
            return -1
        snapshot = self._unnamed.pop() if self._unnamed else self._idle.popitem(last=False)[0]
        if snapshot in self._names:
            del self._snapshots[self._names.pop(snapshot)]
        self._names[snapshot], self._snapshots[name] = name, snapshot
        self._holds[snapshot] = 1
        self._promised.add(snapshot)
        return snapshot

    def keep_promise(self, snapshot: int) -> None:
        """Note that it is copied after the step that is being scheduled; it can be read from the next step on."""
        self._promised.remove(snapshot)
        self._of_this_step.add(snapshot)
        self.release(snapshot)

    def break_promise(self, snapshot: int) -> None:
        self._promised.remove(snapshot)
        del self._snapshots[self._names.pop(snapshot)]
        self.release(snapshot)

    def can_read(self, snapshot: int) -> bool:
        return snapshot not in self._promised and snapshot not in self._of_this_step

    def begin_step(self) -> None:
        self._of_this_step.clear()

    def hold(self, snapshot: int) -> None:
        self._idle.pop(snapshot, None)
        self._holds[snapshot] += 1

    def release(self, snapshot: int) -> None:
        self._holds[snapshot] -= 1
        assert self._holds[snapshot] >= 0
        if self._holds[snapshot] == 0 and snapshot in self._names:
            self._idle[snapshot] = None
        elif self._holds[snapshot] == 0:
            self._unnamed.append(snapshot)
