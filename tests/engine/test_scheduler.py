"""Schedules for thousands of requests, run by a device that is a dictionary: nothing is stuck, lost or mixed up."""

import numpy as np
import pytest

from qwen_dist.engine.batch import LAST_SAMPLED, NOWHERE, Batch, BatchBuilder, StepBatches
from qwen_dist.engine.page_allocator import CacheLimits, PageAllocator, PagedGroup
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.scheduler import Scheduler
from qwen_dist.engine.sequence import Sequence

PAGE, CHUNK, VOCAB, STOP = 8, 4, 97, 0


class Device:
    """What the programs of the runner do, on lists: what a token attends to is hashed into the next token.

    Every place in a page holds the token that was written there, so a wrong page, a wrong position or a place that another
    sequence has overwritten gives another answer than the request has alone.
    """

    def __init__(self, num_slots: int, num_shards: int, max_steps: int, windows):
        self.num_slots, self.num_shards, self.max_steps, self.windows = num_slots, num_shards, max_steps, windows
        self.cache: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        self.last_tokens, self.finished, self.ends = {}, {}, {}

    def run(self, batches: StepBatches) -> list[tuple[Sequence | None, list[int]]]:
        """Return what each row's sequence has sampled."""
        rows = []
        for batch in batches:
            sampled = self._prefill(batch) if batch.is_prefill else self._decode(batch)
            rows += list(zip(batch.sequences, sampled, strict=True))
        return rows

    def _seen(self, batch: Batch, b: int, position: int) -> list[int]:
        """The tokens that row b finds on the pages of each group, up to its own position."""
        tokens = []
        shard, row = divmod(b, len(batch.slots_B) // self.num_shards)
        for group, (pages, window) in enumerate(zip(batch.pages, self.windows, strict=True)):
            first = 0 if window is None else max(0, position - window + 1)
            seen = []
            for e in range(int(pages.num_entries)):
                if pages.row_DE[shard, e] == row and pages.start_DE[shard, e] < NOWHERE:
                    start, page = int(pages.start_DE[shard, e]), int(pages.page_DE[shard, e])
                    assert start + PAGE > first - self.max_steps, "a page behind the window"
                    there = range(max(start, first), min(start + PAGE, position + 1))
                    seen += [self.cache[group, shard, page, at - start] for at in there]
            assert [p for p, _ in sorted(seen)] == list(range(first, position + 1))
            tokens += [token for _, token in sorted(seen)]
        return tokens

    def _write(self, batch: Batch, b: int, position: int, token: int) -> None:
        shard = b // (len(batch.slots_B) // self.num_shards)
        for group, pages in enumerate(batch.pages):
            column = position // PAGE - int(pages.first_page_B[b])
            self.cache[group, shard, int(pages.write_BN[b, column]), position % PAGE] = (position, token)

    def _prefill(self, batch: Batch) -> list[list[int]]:
        for b, sequence in enumerate(batch.sequences):
            if sequence is not None:
                self.ends[int(batch.slots_B[b])] = sequence.end
                is_next = b > 0 and batch.sequences[b - 1] is sequence
                assert batch.continues_B[b] == is_next, "consecutive chunks of a sequence say so"
                assert not is_next or batch.positions_BT[b, 0] == batch.positions_BT[b - 1, -1] + 1, "and are in order"
            for token, position in zip(batch.tokens_BT[b], batch.positions_BT[b], strict=True):
                if position >= 0:
                    self._write(batch, b, int(position), int(token))
        sampled = []
        for b, slot in enumerate(batch.slots_B.tolist()):
            sampled.append([])
            if (index := int(batch.logit_indices_BX[b, 0])) >= 0:
                position = int(batch.positions_BT[b, index])
                sampled[b].append(self._sample(slot, self._seen(batch, b, position), position + 1))
        return sampled

    def _decode(self, batch: Batch) -> list[list[int]]:
        assert 1 <= batch.num_steps <= self.max_steps
        sampled: list[list[int]] = [[] for _ in batch.slots_B]
        for step in range(batch.num_steps):
            for b, slot in enumerate(batch.slots_B.tolist()):
                if slot < self.num_slots and not self.finished[slot]:
                    assert batch.tokens_BT[b, 0] == LAST_SAMPLED
                    position = int(batch.positions_BT[b, 0]) + step
                    self._write(batch, b, position, self.last_tokens[slot])
                    sampled[b].append(self._sample(slot, self._seen(batch, b, position), position + 1))
        return sampled

    def _sample(self, slot: int, seen: list[int], position: int) -> int:
        token = next_token(seen)
        self.last_tokens[slot] = token
        self.finished[slot] = token == STOP or position >= self.ends[slot]
        return token


def next_token(tokens: list[int]) -> int:
    return (sum((index + 3) * (token + 1) for index, token in enumerate(tokens)) * 7919 + len(tokens)) % VOCAB


def alone(prompt, max_new_tokens: int, windows) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token([token for window in windows for token in tokens[-(window or len(tokens)) :]]))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("num_shards", "num_slots", "max_pages", "num_steps", "in_flight", "groups"),
    [
        (1, 7, 40, 1, 1, {None: 1}),
        (1, 16, 12, 1, 1, {None: 3}),
        (2, 8, 9, 5, 1, {None: 1}),
        (1, 5, 8, 8, 0, {None: 1}),
        (4, 8, 30, 3, 1, {None: 1}),
        (1, 7, 40, 1, 1, {None: 1, 5: 3}),
        (1, 16, 9, 3, 1, {11: 2, None: 1}),
        (2, 8, 5, 8, 1, {9: 1}),
    ],
)
def test_thousands_of_requests_each_as_if_alone(num_shards, num_slots, max_pages, num_steps, in_flight, groups):
    """Lengths, limits, stops on the device, stops that only the host sees, cancellations; pages short and plenty."""
    rng = np.random.default_rng(num_slots)
    limits = limits_of(groups, num_slots=num_slots // num_shards, max_length=8 * PAGE, max_step_tokens=5 * CHUNK)
    sizes = {"num_slots": num_slots, "num_shards": num_shards, "chunk_size": CHUNK, "max_chunks": 5}
    memory = max_pages * sum(groups.values())
    scheduler = Scheduler(limits, max_pages=limits.largest(memory), num_decode_steps=num_steps, **sizes)
    batches = BatchBuilder(limits, entry_multiple=4, **sizes)
    device = Device(num_slots, num_shards, num_steps, list(groups))
    total, answers, cancelled, running, flying = 2000, {}, set(), {}, []
    coming = iter(range(total))
    most_running = num_plans = 0
    while True:
        while scheduler.num_waiting < 10 and (key := next(coming, None)) is not None:
            length = int(rng.integers(1, 5 * PAGE))
            # Some are ended by the host only, as by a stop string.
            params = SamplingParams(int(rng.integers(1, 8 * PAGE - length + 1)), stop=("x",) if rng.random() < 0.2 else ())
            prompt = tuple(rng.integers(1, VOCAB, length).tolist())
            end = length + params.max_new_tokens - 1
            assert scheduler.fits(end)
            running[key] = scheduler.add(Request(key, prompt, params), end)
        if running and rng.random() < 0.05:
            key = list(running)[int(rng.integers(len(running)))]
            scheduler.release(running.pop(key))
            cancelled.add(key)
        if not running and not flying:
            break
        schedule = scheduler.schedule(can_preempt=not flying)
        num_plans += 1
        assert schedule or flying, "stuck"
        if schedule:
            flying.append(device.run(batches.build(schedule, scheduler.num_pages)))
        if len(flying) > in_flight or not schedule:
            for sequence, tokens in flying.pop(0):
                for token in tokens:
                    if sequence.is_finished:
                        break
                    sequence.tokens.append(token)
                    answer = sequence.tokens[len(sequence.request.prompt) :]
                    stopped = bool(sequence.request.params.stop) and len(answer) == 3
                    if token == STOP or stopped or len(answer) == sequence.request.params.max_new_tokens:
                        answers[sequence.request.key] = (sequence.request, answer)
                        scheduler.release(sequence)
                        del running[sequence.request.key]
        most_running = max(most_running, scheduler.num_running)
        layers = np.array(list(groups.values()))
        assert layers @ scheduler.num_pages <= memory
        for window, live, held in zip(groups, scheduler.num_live, scheduler.num_held_pages, strict=True):
            assert 0 <= live <= held * PAGE
            # A window before the first token of 5 chunks, and these, which may begin anywhere on a page.
            assert window is None or held <= scheduler.num_running * (-(-(window + 5 * CHUNK - 2) // PAGE) + 1)

    assert answers.keys() | cancelled == set(range(total)) and not answers.keys() & cancelled
    for request, answer in answers.values():
        expected = alone(request.prompt, request.params.max_new_tokens, groups)
        assert answer == (expected[:3] if request.params.stop else expected)
    assert most_running == num_slots or scheduler.num_preempted > 0
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert not any(scheduler.num_held_pages) and not any(scheduler.num_live)
    print(f"{total} requests: {len(answers)} answered, {len(cancelled)} cancelled, {scheduler.num_preempted} preempted, ")
    print(f"{num_plans} steps, at most {most_running} at a time; pool empty")


def limits_of(groups=None, *, num_slots=4, max_length=64, max_step_tokens=16 * CHUNK) -> CacheLimits:
    """`groups`: window → number of layers; a page of each layer is one byte."""
    paged = [PagedGroup(window, layers, layers) for window, layers in (groups or {None: 1}).items()]
    sizes = {"num_slots": num_slots, "page_size": PAGE, "max_length": max_length, "max_step_tokens": max_step_tokens}
    return CacheLimits(paged, **sizes)


def scheduler_of(**changes) -> Scheduler:
    num_slots = changes.get("num_slots", 4)
    return Scheduler(limits_of(num_slots=num_slots), **{"num_slots": 4, "max_pages": 64, "chunk_size": CHUNK} | changes)


def scheduled(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    return [(s.request.key, start, count) for s, start, count, *_ in scheduler.schedule(can_preempt=True)]


def request(key: int, length: int) -> Request:
    return Request(key, tuple(range(1, length + 1)), SamplingParams())


def test_throughput_admits_longer_prompts_first():
    scheduler = scheduler_of(num_slots=2, max_chunks=3)
    for length in (3, 9, 5):
        scheduler.add(request(length, length), 20)
    assert scheduled(scheduler) == [(9, 0, 9)]  # three chunks
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert [scheduled(scheduler) for _ in range(2)] == [[(5, 0, 5), (9, 9, 1)], [(9, 10, 1), (5, 5, 1)]]


def test_latency_admits_who_came_first():
    scheduler = scheduler_of(num_slots=2, max_chunks=3, policy="latency")
    for length in (3, 9, 5):
        scheduler.add(request(length, length), 20)
    assert scheduled(scheduler) == [(3, 0, 3), (9, 0, 8)]
    assert [scheduled(scheduler) for _ in range(2)] == [[(9, 8, 1), (3, 3, 1)], [(3, 4, 1), (9, 9, 1)]]


@pytest.mark.parametrize("policy", ["throughput", "latency"])
def test_a_preempted_sequence_is_admitted_before_those_that_came_later(policy):
    """Two sequences fill all pages; the later one loses its pages, and gets them back before the third begins."""
    scheduler = scheduler_of(num_slots=2, max_pages=4, policy=policy)
    for key in range(3):
        scheduler.add(request(key, 2 * PAGE - 1), 4 * PAGE - 1)
    first, second = (sequence for sequence, *_ in scheduler.schedule(can_preempt=True))
    for sequence in (first, second):
        sequence.tokens.append(1)
    while not scheduler.num_preempted:
        for sequence, _, count, *_ in scheduler.schedule(can_preempt=True):
            sequence.tokens += [1] * count
    assert second.was_preempted and second.slot < 0 and scheduler.num_running == 1
    scheduler.release(first)
    (sequence, start, count, *_), *_ = scheduler.schedule(can_preempt=True)
    assert sequence is second and (start, count) == (0, len(second.tokens))


def test_sequences_decode_in_the_steps_that_compute_prompts():
    """One token a step as long as there are prompts to compute, and several after that."""
    scheduler = scheduler_of(max_chunks=1, num_decode_steps=4)
    for key in range(2):
        scheduler.add(request(key, 2), 40)
    assert scheduled(scheduler) == [(0, 0, 2)]
    scheduler.add(request(2, 2 * CHUNK), 60)
    assert scheduled(scheduler) == [(1, 0, 2), (0, 2, 1)]
    assert scheduled(scheduler) == [(2, 0, CHUNK), (0, 3, 1), (1, 2, 1)]
    assert scheduled(scheduler) == [(2, CHUNK, CHUNK), (0, 4, 1), (1, 3, 1)]
    assert scheduled(scheduler) == [(0, 5, 4), (1, 4, 4), (2, 2 * CHUNK, 4)]


def test_the_pool_grows_with_what_is_there_and_not_further():
    scheduler = scheduler_of()
    assert scheduler.num_pages == (0,)
    scheduler.add(request(0, 1), 30)
    scheduler.schedule(can_preempt=True)
    assert (scheduler.num_pages, scheduler.num_held_pages) == ((16,), (1,))
    for key in range(1, 4):
        scheduler.add(Request(key, (1,) * 47, SamplingParams()), 60)
    scheduler.schedule(can_preempt=True)
    assert (scheduler.num_pages, scheduler.num_held_pages) == ((32,), (19,))


def test_memory_is_divided_so_that_a_window_never_runs_out_first():
    """Memory for 64 pages in each of 4 layers is for 256; 3 layers need 3 pages for each of 4 slots, the one has the rest.

    3, because the 8 tokens of a step and the 4 that its first one sees before it may begin anywhere on a page of 8.
    """
    limits = limits_of({None: 1, 5: 3}, max_length=1000, max_step_tokens=2 * CHUNK)
    assert limits.largest(4 * 64) == 256 - 3 * 12
    sizes = {"num_slots": 4, "chunk_size": CHUNK, "max_chunks": 2}
    assert Scheduler(limits, max_pages=limits.largest(4 * 64), **sizes).fits(1000)
    small = Scheduler(limits, max_pages=limits.largest(4), **sizes)
    assert small.fits(PAGE) and not small.fits(PAGE + 1)


def test_what_never_fits_is_known_before():
    scheduler = scheduler_of(max_pages=4)
    assert scheduler.fits(4 * PAGE) and not scheduler.fits(4 * PAGE + 1)


def test_a_shared_page_is_free_when_its_last_reference_goes():
    allocator = PageAllocator()
    allocator.grow(2)
    page = allocator.allocate()
    allocator.share(page)
    allocator.free(page)
    assert allocator.num_free == 1 and allocator.allocate() != page
    allocator.free(page)
    assert allocator.allocate() == page
    with pytest.raises(AssertionError):
        allocator.free(1 - page), allocator.free(1 - page)


def test_releasing_a_waiting_request_does_not_search_the_queue():
    """Count what a release touches, not time: the heap keeps the entry, and it is skipped when its turn comes."""
    scheduler = scheduler_of(num_slots=1)
    sequences = [scheduler.add(request(key, 3), 20) for key in range(1000)]
    before = list(scheduler._waiting)
    for sequence in sequences[:-1]:
        scheduler.release(sequence)
        if scheduler.num_waiting > 900:
            assert scheduler._waiting == before, "entries are not searched or moved"
    assert scheduler.num_waiting == 1 and len(scheduler._waiting) < 200, "most entries of released requests are gone"
    assert scheduled(scheduler) == [(999, 0, 3)]


def test_for_latency_prefill_has_a_size_more():
    limits = limits_of({None: 1}, num_slots=4, max_length=8 * PAGE, max_step_tokens=16 * CHUNK)
    sizes = {"num_slots": 4, "num_shards": 1, "chunk_size": CHUNK, "max_chunks": 16, "entry_multiple": 4}

    def rows(**more: bool) -> list[int]:
        steps = BatchBuilder(limits, **sizes, **more).empty_batches((8,))
        return [batch.tokens_BT.shape[0] for batch, *decode in steps if batch.is_prefill and not decode]

    assert rows(for_latency=True) == [2, 4, 8, 16]
    assert rows() == [4, 8, 16]


@pytest.mark.parametrize(("has_snapshots", "rows"), [(False, 4), (True, 2)])
def test_what_follows_a_snapshot_is_padded_to_a_page(has_snapshots, rows):
    limits = limits_of({None: 1}, num_slots=4, max_length=8 * PAGE, max_step_tokens=16 * PAGE // 2)
    sizes = {"num_slots": 4, "num_shards": 1, "chunk_size": PAGE // 2, "max_chunks": 16}
    batches = BatchBuilder(limits, entry_multiple=4, has_snapshots=has_snapshots, **sizes)
    smallest = next(batch for batch, *_ in batches.empty_batches((8,)) if batch.is_prefill)
    assert smallest.tokens_BT.shape == (rows, PAGE // 2)
