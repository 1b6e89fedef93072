"""A request while it is answered: its tokens, and its place on the devices. No jax."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from qwen_dist.engine.request import Request


class PageTable:
    """The pages of one sequence in one cache group, in order.

    The positions of the sequence's page number n are in entry n. Where layers have a window, the table is a ring: entry
    n % ring_pages, which then held positions that no query sees any more.
    """

    def __init__(self, ring_pages: int):
        self._ring_pages = ring_pages
        self._pages = np.zeros(4, np.int32)
        self.num_pages = 0

    def append(self, page: int) -> None:
        if self.num_pages == len(self._pages):
            self._pages = np.concatenate([self._pages, self._pages])
        self._pages[self.num_pages] = page
        self.num_pages += 1

    def page(self, number: int) -> int:
        """Return the page that holds the sequence's page number `number`."""
        return int(self._pages[number % self._ring_pages])

    def pages(self, first: int, last: int) -> np.ndarray:
        """Return the pages of the page numbers from `first` to `last`, int32."""
        if last < self._ring_pages:
            return self._pages[first : last + 1]
        return self._pages[np.arange(first, last + 1) % self._ring_pages]

    def clear(self) -> list[int]:
        """Empty the table, and return the pages that it had."""
        pages = self._pages[: self.num_pages].tolist()
        self.num_pages = 0
        return pages


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request while it is answered.

    Attributes:
      tokens: the prompt and the answer so far.
      end: the last position that a token may have.
      arrival: the number of requests before it.
      shard, slot: its data-parallel shard, and its place among all slots; the slot is -1 while it waits.
      page_tables: one for each cache group.
      num_prefill_tokens: the tokens to compute before it can decode.
      prefill_start: the position from which on prefill computes; the pages before it came from the prefix cache.
      snapshot: of the recurrent layers' states at `prefill_start`, until prefill begins; -1: there is none.
      save_points: positions at which prefill saves the recurrent layers' states, in order, each with its snapshot.
      num_computed_tokens: the tokens whose states exist once every scheduled step has run.
      num_cached_tokens: `prefill_start` when its prefill began for the first time.
      was_preempted: whether it has lost its slot and pages before it was finished.
      is_finished: whether it has been released for good.
    """

    request: Request
    tokens: list[int]
    end: int
    arrival: int = 0
    shard: int = 0
    slot: int = -1
    page_tables: list[PageTable] = dataclasses.field(default_factory=list)
    num_prefill_tokens: int = 0
    prefill_start: int = 0
    snapshot: int = -1
    save_points: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    was_preempted: bool = False
    is_finished: bool = False
    _page_names: list[bytes] = dataclasses.field(default_factory=list)

    def page_names(self, page_size: int) -> list[bytes]:
        """Return the names of the whole pages of its tokens: the hash of a page's tokens and of the name before.

        Equal names mean equal tokens from the start on, and the same adapter, on which the states depend too.
        """
        names = self._page_names
        while (len(names) + 1) * page_size <= len(self.tokens):
            tokens = np.array(self.tokens[len(names) * page_size : (len(names) + 1) * page_size], "<i4")
            before = names[-1] if names else self.request.adapter.encode()
            names.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return names

    @property
    def is_constrained(self) -> bool:
        """Whether the tokens that it may sample depend on the one before, which the host must see first."""
        return self.request.params.structured_outputs is not None

    @property
    def has_begun(self) -> bool:
        """Whether a step has computed some of its tokens since it got its slot."""
        return self.num_computed_tokens > self.prefill_start

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def can_decode(self) -> bool:
        return self.num_prefill_tokens <= self.num_computed_tokens < self.end
