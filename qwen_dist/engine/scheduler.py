"""Which sequences compute which of their tokens next. No jax, and no layout of a device.

A sequence gets a slot and, as it grows, pages. Its prompt is computed in chunks (prefill), which share a step with the
chunks of other prompts; then it decodes together with all others that have finished prefill. When it finishes, its slot and
pages go to the next sequence at once. When pages run out, the sequence that was admitted last is preempted: it gives up its
slot and pages, and later prefills again, answer so far included.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from qwen_dist.engine.page_allocator import CacheLimits, PageAllocator
from qwen_dist.engine.request import Request
from qwen_dist.engine.sequence import PageTable, Sequence


class ScheduledTokens(NamedTuple):
    """Tokens of one sequence that the next step computes: `num_tokens` from position `start` on.

    Where `start` is before the end of prefill the tokens are known and are computed at once; otherwise each is sampled
    after the one before it.
    """

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def is_prefill(self) -> bool:
        return self.start < self.sequence.num_prefill_tokens


Schedule = list[ScheduledTokens]
# A sort key: the lowest is admitted first.
Policy = Callable[[Sequence], Any]


def _throughput(sequence: Sequence) -> Any:
    """Admit preempted sequences first, then the longest prompt: the last sequences to finish are then short ones."""
    return not sequence.was_preempted, -len(sequence.tokens), sequence.arrival


def _latency(sequence: Sequence) -> Any:
    """Admit who came first."""
    return sequence.arrival


POLICIES: dict[str, Policy] = {"throughput": _throughput, "latency": _latency}


class Scheduler:
    """Schedules one step after the other; deterministic, so that several processes schedule alike.

    Args:
      limits: pages that sequences of one shard can need.
      num_slots: sequences at a time in all shards, a multiple of `num_shards`.
      max_pages: the argument of `limits.of_pools` that memory allows; pools are small at first and grow up to it.
      num_shards: over how many data-parallel shards sequences are distributed.
      chunk_size: tokens of a chunk of a prompt.
      max_chunks: chunks of prompts in a step, in each shard.
      num_decode_steps: tokens that a sequence decodes in one step.
      policy: the order in which waiting sequences are admitted.
    """

    def __init__(
        self,
        limits: CacheLimits,
        *,
        num_slots: int,
        max_pages: int,
        num_shards: int = 1,
        chunk_size: int = 32,
        max_chunks: int = 16,
        num_decode_steps: int = 1,
        policy: str = "throughput",
    ):
        assert num_slots % num_shards == 0 and limits.page_size % chunk_size == 0
        assert 1 <= num_decode_steps <= limits.page_size
        self._limits = limits
        self.num_slots, self.max_pages = num_slots, max_pages
        self.num_preempted = 0
        self.num_waiting = 0
        self._chunk_size, self._max_chunks, self._num_decode_steps = chunk_size, max_chunks, num_decode_steps
        self._policy, self._alternates = POLICIES[policy], policy == "latency"
        self._waiting: list[tuple[Any, int, Sequence]] = []
        self._arrivals, self._pushes = itertools.count(), itertools.count()
        slots = num_slots // num_shards
        self._shards = [_Shard(range(n * slots, (n + 1) * slots), limits) for n in range(num_shards)]
        self._allowed_pages = 0
        self._was_prefill = False

    # --- the state ---

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each cache group that each shard has now."""
        return self._limits.of_pools(self._allowed_pages)

    @property
    def num_running(self) -> int:
        return sum(len(shard.sequences) for shard in self._shards)

    @property
    def num_held_pages(self) -> tuple[int, ...]:
        """Pages of each cache group that sequences hold, in all shards."""
        by_group = zip(*(shard.allocators for shard in self._shards), strict=True)
        return tuple(sum(one.num_pages - one.num_free for one in allocators) for allocators in by_group)

    @property
    def num_live(self) -> tuple[int, ...]:
        """Positions of each cache group that queries can still see."""
        lengths = [sequence.num_computed_tokens for shard in self._shards for sequence in shard.sequences]
        return tuple(
            sum(self._limits.num_live(group, length) for length in lengths) for group in range(len(self._limits.groups))
        )

    def reserve(self) -> None:
        """Let the pools have all pages that memory allows, so that they never grow."""
        self._allowed_pages = self.max_pages
        for shard in self._shards:
            shard.grow(self.num_pages)

    # --- requests ---

    def fits(self, num_positions: int) -> bool:
        """Return whether a sequence of this many positions can ever be computed."""
        needed, most = self._limits.of_sequence(num_positions), self._limits.of_pools(self.max_pages)
        return all(number <= there for number, there in zip(needed, most, strict=True))

    def add(self, request: Request, end: int) -> Sequence:
        """Queue a request. `end`: the last position that a token may have."""
        sequence = Sequence(request, list(request.prompt), end, arrival=next(self._arrivals))
        self._push(sequence)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Free the slot and the pages of a sequence that is finished or aborted; it takes no time to find it."""
        sequence.is_finished = True
        if sequence.slot < 0:
            self.num_waiting -= 1  # its entry in the queue is skipped when its turn comes
            self._compact()
        else:
            self._shards[sequence.shard].remove(sequence)

    def _push(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (self._policy(sequence), next(self._pushes), sequence))
        self.num_waiting += 1

    def _compact(self) -> None:
        """Drop the entries of released sequences once they are most of the queue."""
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [entry for entry in self._waiting if not entry[2].is_finished]
            heapq.heapify(self._waiting)

    # --- steps ---

    def schedule(self, *, can_preempt: bool) -> Schedule:
        """Return what the next step computes: chunks of prompts, or tokens to decode.

        Several chunks of one sequence are one entry. Empty when there is nothing to do, or when it depends on results still
        to come.

        Args:
          can_preempt: no step is in flight, so that every sequence's tokens are known.
        """
        self._admit()
        prefilling = [[s for s in shard.sequences if s.is_prefilling] for shard in self._shards]
        ready = [[s for s in shard.sequences if s.can_decode] for shard in self._shards]
        num_prefilling, num_ready = sum(map(len, prefilling)), sum(map(len, ready))
        # Prefill and decode take turns, but most slots are filled before few sequences decode for long. For latency they
        # always take turns, so that nobody waits for a token longer than one step of prefill takes.
        if num_prefilling and (not self._was_prefill or num_ready < (1 if self._alternates else num_prefilling)):
            self._was_prefill = True
            return [scheduled for sequences in prefilling for scheduled in self._chunks(sequences)]
        self._was_prefill = False
        if not num_ready:
            return []
        steps = min(self._num_decode_steps, max(s.end - s.num_computed_tokens for sequences in ready for s in sequences))
        if not self._ensure_pages(ready, steps, can_preempt):
            return []
        still_ready = (s for sequences in ready for s in sequences if s.slot >= 0)
        return [self._compute(s, min(steps, s.end - s.num_computed_tokens)) for s in still_ready]

    def _chunks(self, prefilling: list[Sequence]) -> Schedule:
        """Distribute a step's chunks over the sequences of a shard, in order."""
        left, schedule = self._max_chunks, []
        for sequence in prefilling:
            if left == 0:
                break
            num_tokens = min(left * self._chunk_size, sequence.num_prefill_tokens - sequence.num_computed_tokens)
            left -= -(-num_tokens // self._chunk_size)
            schedule.append(self._compute(sequence, num_tokens))
        return schedule

    def _compute(self, sequence: Sequence, num_tokens: int) -> ScheduledTokens:
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_tokens
        return ScheduledTokens(sequence, start, num_tokens)

    # --- slots and pages ---

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0][2]
            if sequence.is_finished:
                heapq.heappop(self._waiting)
                continue
            shard = max(self._shards, key=lambda shard: (bool(shard.free_slots), shard.num_free_pages))
            # With the first position of the answer, so that it can at least begin.
            needed = self._limits.of_sequence(min(len(sequence.tokens), sequence.end - 1) + 1)
            if not shard.free_slots or not self._find_pages(shard, needed):
                return
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            sequence.shard = self._shards.index(shard)
            sequence.num_computed_tokens, sequence.num_prefill_tokens = 0, len(sequence.tokens)
            shard.add(sequence, needed)

    def _find_pages(self, shard: _Shard, missing: tuple[int, ...]) -> bool:
        """Return whether a shard has this many free pages of each group, after growing all pools if memory allows it."""
        while any(one.num_free < number for one, number in zip(shard.allocators, missing, strict=True)):
            if self._allowed_pages == self.max_pages:
                return False
            more = max(2 * self._allowed_pages, 4 * self.num_slots // len(self._shards), 16)
            self._allowed_pages = min(more, self.max_pages)
            for one in self._shards:
                one.grow(self.num_pages)
        return True

    def _ensure_pages(self, ready: list[list[Sequence]], steps: int, can_preempt: bool) -> bool:
        """Give every sequence the pages of its next tokens, if need be those of the sequences admitted last."""
        page_size = self._limits.page_size
        for shard, sequences in zip(self._shards, ready, strict=True):
            for sequence in sequences:
                after = min(sequence.num_computed_tokens + steps, sequence.end)
                if (after - 1) // page_size == (sequence.num_computed_tokens - 1) // page_size:
                    continue  # most steps need no further page
                needed = self._limits.of_sequence(after)
                while sequence.slot >= 0 and any(missing := shard.missing(sequence, needed)):
                    if self._find_pages(shard, missing):
                        shard.extend(sequence, needed)
                    elif can_preempt:
                        self._preempt(shard)
                    else:
                        return False
        return True

    def _preempt(self, shard: _Shard) -> None:
        """Send the sequence that was admitted last back to the queue."""
        sequence = next(reversed(shard.sequences))
        shard.remove(sequence)
        sequence.num_prefill_tokens = sequence.num_computed_tokens = 0
        sequence.was_preempted = True
        self._push(sequence)
        self.num_preempted += 1


class _Shard:
    """The slots of one data-parallel shard, and a pool of pages for each cache group."""

    def __init__(self, slots: range, limits: CacheLimits):
        self.free_slots = list(slots)
        self._limits = limits
        self.allocators = [PageAllocator() for _ in limits.groups]
        self.sequences: dict[Sequence, None] = {}  # in the order of admission

    @property
    def num_free_pages(self) -> int:
        return self.allocators[0].num_free if self.allocators else len(self.free_slots)

    def grow(self, num_pages: tuple[int, ...]) -> None:
        for allocator, number in zip(self.allocators, num_pages, strict=True):
            allocator.grow(number)

    def add(self, sequence: Sequence, num_pages: tuple[int, ...]) -> None:
        sequence.slot = heapq.heappop(self.free_slots)
        sequence.page_tables = [PageTable(ring) for ring in self._limits.ring_pages]
        self.sequences[sequence] = None
        self.extend(sequence, num_pages)

    def missing(self, sequence: Sequence, num_pages: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many pages of each group the sequence lacks to have `num_pages`."""
        return tuple(max(0, n - table.num_pages) for n, table in zip(num_pages, sequence.page_tables, strict=True))

    def extend(self, sequence: Sequence, num_pages: tuple[int, ...]) -> None:
        """Give a sequence pages of each group, up to `num_pages`."""
        for allocator, table, number in zip(self.allocators, sequence.page_tables, num_pages, strict=True):
            while table.num_pages < number:
                table.append(allocator.allocate())

    def remove(self, sequence: Sequence) -> None:
        del self.sequences[sequence]
        heapq.heappush(self.free_slots, sequence.slot)
        for allocator, table in zip(self.allocators, sequence.page_tables, strict=True):
            for page in table.clear():
                allocator.free(page)
        sequence.slot = -1
