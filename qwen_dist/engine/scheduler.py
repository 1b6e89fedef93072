"""Which sequences compute which of their tokens next. No jax, and no layout of a device.

A sequence gets a slot and, as it grows, pages. Its prompt is computed in chunks (prefill), which share a step with the
chunks of other prompts and with all sequences that decode; then it decodes, too. When it finishes, its slot and pages go to
the next sequence at once. When pages run out, the sequence that was admitted last is preempted: it gives up its
slot and pages, and later prefills again, answer so far included.

With a prefix cache, a sequence that is admitted takes the whole pages of its tokens that exist, and prefill begins after
them. The pages of a prompt have their names from admission on, before they are computed: a sequence that is admitted later
shares them and waits until the step is scheduled that computes them. That may be the same step, because in each layer the
keys and values of all tokens are written before any are read. Where the model has recurrent layers, prefill begins at a
position of which there is a snapshot, or will be after the step of another sequence, which must be an earlier step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qwen_dist.engine.page_allocator import CacheLimits, PageAllocator, SnapshotPool
from qwen_dist.engine.request import Request
from qwen_dist.engine.sequence import PageTable, Sequence

# A snapshot must save at least the computation of this many pages: it takes memory, and may end a step of prefill.
PAGES_PER_SNAPSHOT = 4


class SavedStates(NamedTuple):
    """The recurrent layers' states of a sequence as they are before position `end`.

    After the step they are in `slot`, and are copied from there to `snapshot`. It is the slot of the sequence if its tokens
    of this step end at `end`, otherwise a slot that no sequence has.
    """

    end: int
    slot: int
    snapshot: int


class ScheduledTokens(NamedTuple):
    """Tokens of one sequence that the next step computes: `num_tokens` from position `start` on.

    Where `start` is before the end of prefill the tokens are known and are computed at once; otherwise each is sampled
    after the one before it. Before the step the recurrent layers' states are restored from the snapshot `restored`, if it
    is not -1; after it those in `saved` are copied to snapshots.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    restored: int = -1
    saved: tuple[SavedStates, ...] = ()

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
      prefix_cache: whether sequences share pages, if the limits allow it.
      num_snapshots: of each shard, for a model with recurrent layers, which has no prefix cache without any.
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
        prefix_cache: bool = False,
        num_snapshots: int | None = None,
    ):
        assert num_slots % num_shards == 0 and limits.page_size % chunk_size == 0
        assert 1 <= num_decode_steps <= limits.page_size
        self._limits = limits
        self.num_slots, self.max_pages = num_slots, max_pages
        self.num_preempted = 0
        self.num_waiting = 0
        self._chunk_size, self._max_chunks, self._num_decode_steps = chunk_size, max_chunks, num_decode_steps
        self._policy = POLICIES[policy]
        self._has_prefix_cache = prefix_cache and limits.can_share and num_snapshots != 0
        self._is_recurrent = num_snapshots is not None
        self._waiting: list[tuple[Any, int, Sequence]] = []
        self._arrivals, self._pushes = itertools.count(), itertools.count()
        slots = num_slots // num_shards
        self._shards = [_Shard(range(n * slots, (n + 1) * slots), limits, num_snapshots or 0) for n in range(num_shards)]
        self._allowed_pages = 0

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
    def num_cached_pages(self) -> tuple[int, ...]:
        """Pages of each cache group that nobody holds and that a sequence can still take, in all shards."""
        by_group = zip(*(shard.allocators for shard in self._shards), strict=True)
        return tuple(sum(one.num_cached for one in allocators) for allocators in by_group)

    @property
    def num_live(self) -> tuple[int, ...]:
        """Positions of each cache group that queries can still see; those of shared pages count once."""
        lengths = [sequence.num_computed_tokens for shard in self._shards for sequence in shard.sequences]
        shared = [
            sum(one.num_shared for one in column) for column in zip(*(s.allocators for s in self._shards), strict=True)
        ]
        return tuple(
            sum(self._limits.num_live(group, length) for length in lengths) - shared[group] * self._limits.page_size
            for group in range(len(self._limits.groups))
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
            self._leave(sequence)

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
        """Return what the next step computes: chunks of prompts, and tokens to decode.

        Several chunks of one sequence are one entry. Empty when there is nothing to do, or when it depends on results still
        to come.

        Args:
          can_preempt: no step is in flight, so that every sequence's tokens are known.
        """
        for shard in self._shards:
            shard.snapshots.begin_step()
        self._admit()
        ready = [[s for s in shard.sequences if s.can_decode] for shard in self._shards]
        is_prefilling = any(s.is_prefilling for shard in self._shards for s in shard.sequences)
        steps = 1
        if any(map(len, ready)):
            if not is_prefilling:
                steps = self._decode_steps([s for sequences in ready for s in sequences])
            if not self._ensure_pages(ready, steps, can_preempt):
                return []
        schedule = [
            scheduled
            for shard in self._shards
            for scheduled in self._chunks([s for s in shard.sequences if s.is_prefilling])
        ]
        still_ready = (s for sequences in ready for s in sequences if s.slot >= 0)
        return schedule + [self._decode(s, min(steps, s.end - s.num_computed_tokens)) for s in still_ready]

    def _decode_steps(self, ready: list[Sequence]) -> int:
        """Return how many tokens each sequence decodes before the host sees them."""
        if any(s.is_constrained for s in ready):
            return 1
        return min(self._num_decode_steps, max(s.end - s.num_computed_tokens for s in ready))

    def _chunks(self, prefilling: list[Sequence]) -> Schedule:
        """Distribute a step's chunks over the sequences of a shard, in order.

        To compute tokens after a save point, a step needs a free slot for the states there. Without one, it ends there for
        this sequence.
        """
        left, schedule = self._max_chunks, []
        idle_slots = list(self._shards[prefilling[0].shard].free_slots) if prefilling else []
        for sequence in prefilling:
            if left == 0:
                break
            if self._shards[sequence.shard].must_wait(sequence):
                continue
            ends = [*(end for end, _ in sequence.save_points), sequence.num_prefill_tokens]
            last = ends[min(len(idle_slots), len(ends) - 1)]
            num_tokens = min(left * self._chunk_size, last - sequence.num_computed_tokens)
            left -= -(-num_tokens // self._chunk_size)
            schedule.append(self._prefill(sequence, num_tokens, idle_slots))
        return schedule

    def _decode(self, sequence: Sequence, num_tokens: int) -> ScheduledTokens:
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_tokens
        return ScheduledTokens(sequence, start, num_tokens)

    def _prefill(self, sequence: Sequence, num_tokens: int, idle_slots: list[int]) -> ScheduledTokens:
        """Schedule tokens of a prompt. States that are saved before the last of them take a slot from `idle_slots`."""
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_tokens
        restored, reached = self._shards[sequence.shard].keep_promises(sequence, start)
        saved = tuple(
            SavedStates(end, sequence.slot if end == start + num_tokens else idle_slots.pop(), snapshot)
            for end, snapshot in reached
        )
        return ScheduledTokens(sequence, start, num_tokens, restored, saved)

    # --- slots and pages ---

    def _admit(self) -> None:
        while self._waiting and any(shard.free_slots for shard in self._shards):
            sequence = self._waiting[0][2]
            if sequence.is_finished:
                heapq.heappop(self._waiting)
                continue
            shard = self._choose_shard(sequence)
            if not self._begin(sequence, shard):
                return
            heapq.heappop(self._waiting)
            self.num_waiting -= 1

    def _choose_shard(self, sequence: Sequence) -> _Shard:
        """Return the shard with a free slot that has most of the tokens cached, or else the most free pages.

        A shard that has a quarter of its slots more in use than another gets no request for the sake of its cache.
        """
        if len(self._shards) == 1:
            return self._shards[0]
        fewest = min(len(shard.sequences) for shard in self._shards)
        most = fewest + max(1, self.num_slots // len(self._shards) // 4)

        def rank(shard: _Shard) -> tuple[bool, int, int]:
            num_cached = len(self._cached(sequence, shard)[0]) if len(shard.sequences) < most else 0
            return bool(shard.free_slots), num_cached, shard.num_free_pages

        return max(self._shards, key=rank)

    def _cached(self, sequence: Sequence, shard: _Shard) -> tuple[list[int], int, int]:
        """Return the pages that a sequence can begin after, their snapshot or -1, and how many of its pages exist.

        At least the last token is computed, for its logits.
        """
        if not self._has_prefix_cache or sequence.request.params.prompt_logprobs is not None:
            return [], -1, 0  # a prompt that is scored needs the logits of all its tokens
        names = self._names_before_last(sequence)
        pages = shard.allocators[0].find(names)
        if not self._is_recurrent:
            return pages, -1, len(pages)
        number, snapshot = shard.snapshots.find(names[: len(pages)])
        return pages[:number], snapshot, len(pages)

    def _names_before_last(self, sequence: Sequence) -> list[bytes]:
        """Return the names of the whole pages of all tokens but the last."""
        page_size = self._limits.page_size
        return sequence.page_names(page_size)[: (len(sequence.tokens) - 1) // page_size]

    def _begin(self, sequence: Sequence, shard: _Shard) -> bool:
        """Give a sequence a slot and the pages of its tokens. Return False if there are not enough pages."""
        # With the first position of the answer, so that it can at least begin.
        needed = self._limits.of_sequence(min(len(sequence.tokens), sequence.end - 1) + 1)
        cached, snapshot, num_known = self._cached(sequence, shard)
        shard.hold(cached, snapshot)  # before others are looked for, which could be these
        if not self._find_pages(shard, tuple(number - len(cached) for number in needed)):
            shard.drop(cached, snapshot)
            return False
        sequence.shard = self._shards.index(shard)
        sequence.num_prefill_tokens = len(sequence.tokens)
        sequence.prefill_start = sequence.num_computed_tokens = len(cached) * self._limits.page_size
        if not sequence.was_preempted:
            sequence.num_cached_tokens = sequence.prefill_start
        sequence.snapshot = snapshot
        shard.add(sequence, needed, cached)
        if self._has_prefix_cache:
            shard.promise(sequence)
            if self._is_recurrent:
                shard.promise_snapshots(sequence, self._names_before_last(sequence), num_known)
        return True

    def _find_pages(self, shard: _Shard, missing: tuple[int, ...]) -> bool:
        """Return whether a shard has this many free pages of each group, after growing all pools if memory allows it.

        Pools also grow before a page goes that was useful in the prefix cache.
        """
        needed = list(zip(shard.allocators, missing, strict=True))
        while not all(one.has(number, without_reused=True) for one, number in needed):
            if self._allowed_pages == self.max_pages:
                return all(one.has(number) for one, number in needed)
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
        sequence.was_preempted = True
        self._requeue(sequence)
        self.num_preempted += 1

    def _requeue(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_prefill_tokens = sequence.num_computed_tokens = sequence.prefill_start = 0
        self._push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take slot and pages from a sequence, and from those that wait for pages that it would have computed."""
        shard = self._shards[sequence.shard]
        if self._has_prefix_cache:
            shard.name_answer(sequence)
        for other in shard.remove(sequence):
            if other.slot >= 0:
                self._requeue(other)


class _Shard:
    """The slots of one data-parallel shard, and a pool of pages for each cache group."""

    def __init__(self, slots: range, limits: CacheLimits, num_snapshots: int):
        self.free_slots = list(slots)
        self._limits = limits
        self.allocators = [PageAllocator() for _ in limits.groups]
        self.snapshots = SnapshotPool(num_snapshots)
        self.sequences: dict[Sequence, None] = {}  # in the order of admission
        self._promised: set[int] = set()  # pages that have a name and whose tokens no step has been scheduled to compute

    @property
    def num_free_pages(self) -> int:
        return self.allocators[0].num_free if self.allocators else len(self.free_slots)

    def grow(self, num_pages: tuple[int, ...]) -> None:
        for allocator, number in zip(self.allocators, num_pages, strict=True):
            allocator.grow(number)

    def add(self, sequence: Sequence, num_pages: tuple[int, ...], cached: list[int]) -> None:
        """Give a sequence a slot and `num_pages` of each group, of which the `cached` pages are held already."""
        sequence.slot = heapq.heappop(self.free_slots)
        sequence.page_tables = [PageTable(ring) for ring in self._limits.ring_pages]
        for page in cached:
            sequence.page_tables[0].append(page)
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

    def remove(self, sequence: Sequence) -> list[Sequence]:
        """Take slot and pages from a sequence. Return the sequences that wait for what it would have computed."""
        waiting = self._break_promises(sequence)
        del self.sequences[sequence]
        heapq.heappush(self.free_slots, sequence.slot)
        for allocator, table in zip(self.allocators, sequence.page_tables, strict=True):
            # The last pages of a sequence are given away before the first ones, without which they are of no use.
            for page in reversed(table.clear()):
                allocator.free(page)
        sequence.slot = -1
        return waiting

    # --- the prefix cache, of models with one cache group ---

    def hold(self, pages: list[int], snapshot: int) -> None:
        for page in pages:
            self.allocators[0].share(page)
        if snapshot >= 0:
            self.snapshots.hold(snapshot)

    def drop(self, pages: list[int], snapshot: int) -> None:
        for page in reversed(pages):
            self.allocators[0].free(page)
        if snapshot >= 0:
            self.snapshots.release(snapshot)

    def promise(self, sequence: Sequence) -> None:
        """Name the whole pages of a sequence's tokens that prefill is going to compute."""
        for page, name in self._named(sequence, sequence.num_prefill_tokens):
            if self.allocators[0].name(page, name):
                self._promised.add(page)

    def promise_snapshots(self, sequence: Sequence, names: list[bytes], num_known: int) -> None:
        """Choose positions that get a snapshot: where the known pages end, as others may branch there, and the last one."""
        last, page_size = sequence.prefill_start // self._limits.page_size, self._limits.page_size
        for number in (num_known, len(names)):
            if number - last >= PAGES_PER_SNAPSHOT and (snapshot := self.snapshots.promise(names[number - 1])) >= 0:
                sequence.save_points.append((number * page_size, snapshot))
                last = number

    def keep_promises(self, sequence: Sequence, start: int) -> tuple[int, list[tuple[int, int]]]:
        """Note that a step is scheduled that computes the tokens of a sequence from `start` on.

        Return the snapshot that is restored before it, -1 for none, and those of `Sequence.save_points` that it reaches.
        """
        if self._promised:
            num_pages = sequence.num_computed_tokens // self._limits.page_size
            first = start // self._limits.page_size
            self._promised.difference_update(sequence.page_tables[0].pages(first, num_pages - 1).tolist())
        restored, sequence.snapshot = sequence.snapshot, -1
        if restored >= 0:
            self.snapshots.release(restored)
        reached = [point for point in sequence.save_points if point[0] <= sequence.num_computed_tokens]
        for _, snapshot in reached:
            self.snapshots.keep_promise(snapshot)
        sequence.save_points = sequence.save_points[len(reached) :]
        return restored, reached

    def _break_promises(self, sequence: Sequence) -> list[Sequence]:
        """Forget what a sequence has promised and not computed. Return the sequences that wait for it."""
        pages = self._promised.intersection(self._uncomputed_pages(sequence)) if self._promised else set()
        snapshots = {snapshot for _, snapshot in sequence.save_points}
        self._promised -= pages
        for page in pages:
            self.allocators[0].forget(page)
        for snapshot in snapshots:
            self.snapshots.break_promise(snapshot)
        if sequence.snapshot >= 0:
            self.snapshots.release(sequence.snapshot)
        sequence.save_points, sequence.snapshot = [], -1

        def waits(other: Sequence) -> bool:
            if other is sequence or other.has_begun:
                return False
            return other.snapshot in snapshots or not pages.isdisjoint(self.cached_pages(other))

        return list(filter(waits, self.sequences)) if pages or snapshots else []

    def must_wait(self, sequence: Sequence) -> bool:
        """Return whether a sequence begins after pages, or from a snapshot, that do not exist yet."""
        if sequence.has_begun:
            return False
        if sequence.snapshot >= 0 and not self.snapshots.can_read(sequence.snapshot):
            return True
        return bool(self._promised) and not self._promised.isdisjoint(self.cached_pages(sequence)[-1:])

    def name_answer(self, sequence: Sequence) -> None:
        """Name the whole pages whose tokens are known and computed; a last token may have been sampled only."""
        for page, name in self._named(sequence, min(sequence.num_computed_tokens, len(sequence.tokens) - 1)):
            self.allocators[0].name(page, name)

    def cached_pages(self, sequence: Sequence) -> list[int]:
        """Return the pages of a sequence that came from the cache, or from sequences that were admitted before it."""
        if sequence.prefill_start == 0:
            return []
        return sequence.page_tables[0].pages(0, sequence.prefill_start // self._limits.page_size - 1).tolist()

    def _named(self, sequence: Sequence, num_tokens: int) -> Iterator[tuple[int, bytes]]:
        """Yield the pages of its first tokens that did not come from the cache, with their names."""
        page_size = self._limits.page_size
        names = sequence.page_names(page_size)
        for number in range(sequence.prefill_start // page_size, num_tokens // page_size):
            yield sequence.page_tables[0].page(number), names[number]

    def _uncomputed_pages(self, sequence: Sequence) -> list[int]:
        table = sequence.page_tables[0]
        return table.pages(sequence.num_computed_tokens // self._limits.page_size, table.num_pages - 1).tolist()
