"""The prefix cache: pages that several sequences share, by themselves, by the scheduler and by real models."""

import collections
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import CHUNK, PAGE, STOP, VOCAB, Device, alone, limits_of, scheduled, scheduler_of

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.batch import BatchBuilder
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.page_allocator import PageAllocator, SnapshotPool
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.scheduler import SavedStates, Scheduler
from qwen_dist.engine.sequence import Sequence
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops import slots
from qwen_dist.ops.paged_cache import PAGE as BLOCK
from qwen_dist.ops.paged_cache import PagedState
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

# --- pages ---


def check_pages(allocator: PageAllocator, tables: list[list[int]]) -> None:
    """Every page has one role: free, cached, or held by as many tables as it has references."""
    held = collections.Counter(page for table in tables for page in table)
    free, cached = set(allocator._unnamed), set(allocator._cached)
    assert len(free) == len(allocator._unnamed) and not free & cached and not (free | cached) & held.keys()
    assert free | cached | held.keys() == set(range(allocator.num_pages))
    assert [held[page] for page in range(allocator.num_pages)] == allocator._reference_counts
    assert allocator._pages == {name: page for page, name in allocator._names.items()}
    assert cached <= allocator._names.keys() and not free & allocator._names.keys()
    assert allocator.num_free == len(free) + len(cached) and allocator.num_cached == len(cached)
    assert allocator.num_shared == sum(count - 1 for count in held.values())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12), st.lists(st.tuples(st.sampled_from("beg"), st.lists(st.integers(0, 2), max_size=5)), max_size=40)
)
def test_every_page_has_one_role(num_pages, operations):
    """Sequences of names begin and end; a name that is found is the page that got it last, with nothing between."""
    allocator, running, content = PageAllocator(), [], {}
    allocator.grow(num_pages)
    for kind, path in operations:
        if kind == "b":
            names = [bytes(path[:end]) for end in range(1, len(path) + 1)]
            table = allocator.find(names)
            assert [content[page] for page in table] == names[: len(table)]
            for page in table:
                allocator.share(page)
            if not allocator.has(len(names) - len(table)):
                for page in reversed(table):
                    allocator.free(page)
            else:
                for name in names[len(table) :]:
                    table.append(allocator.allocate())
                    content[table[-1]] = name if allocator.name(table[-1], name) else None
                running.append(table)
        elif kind == "e" and running:
            for page in reversed(running.pop(sum(path) % len(running))):
                allocator.free(page)
        elif kind == "g":
            allocator.grow(allocator.num_pages + len(path))
        check_pages(allocator, running)
    for table in running:
        for page in reversed(table):
            allocator.free(page)
    check_pages(allocator, [])
    assert allocator.num_free == allocator.num_pages


def test_the_least_recently_used_page_goes_first_and_a_shared_one_never():
    allocator = PageAllocator()
    allocator.grow(3)
    one, two, three = (allocator.allocate() for _ in range(3))
    for page, name in ((one, b"1"), (two, b"2"), (three, b"3")):
        assert allocator.name(page, name)
    for page in (two, one):
        allocator.free(page)
    assert allocator.has(2) and not allocator.has(3)
    assert allocator.allocate() == two and allocator.find([b"2"]) == []
    allocator.share(one)
    assert not allocator.has(1) and allocator.find([b"1", b"2"]) == [one]


def test_a_useful_page_makes_the_pool_grow():
    allocator = PageAllocator()
    allocator.grow(1)
    page = allocator.allocate()
    allocator.name(page, b"1")
    allocator.free(page)
    assert allocator.has(1, without_reused=True)
    allocator.share(page), allocator.free(page)
    assert allocator.has(1) and not allocator.has(1, without_reused=True)


def test_a_name_says_all_tokens_before():
    def names(*tokens: int) -> list[bytes]:
        return Sequence(Request(0, tokens, SamplingParams()), list(tokens), 99).page_names(2)

    assert len(names(1, 2, 3, 4, 5)) == 2
    assert names(1, 2, 3, 4) == names(1, 2, 3, 4, 5)
    assert names(1, 2, 3, 4)[0] == names(1, 2, 9, 4)[0] and names(1, 2, 3, 4)[1] != names(1, 2, 9, 4)[1]
    assert names(1, 2, 3, 4)[1] not in (names(3, 4)[0], names(7, 2, 3, 4)[1])
    growing = Sequence(Request(0, (1, 2, 3), SamplingParams()), [1, 2, 3], 99)
    assert growing.page_names(2) == names(1, 2)
    growing.tokens.append(4)
    assert growing.page_names(2) == names(1, 2, 3, 4)


# --- schedules ---


class CheckedDevice(Device):
    """Also keeps which pages were written in the last step."""

    def run(self, batches):
        self.written = set()
        return super().run(batches)

    def _write(self, batch, b, position, token):
        super()._write(batch, b, position, token)
        shard = b // (len(batch.slots_B) // self.num_shards)
        pages = batch.pages[0]
        self.written.add((shard, int(pages.write_BN[b, position // PAGE - int(pages.first_page_B[b])])))


def finished_pages(scheduler: Scheduler) -> set[tuple[int, int, bytes]]:
    """Shard, page and name of the pages whose tokens have all been computed."""
    return {
        (number, page, name)
        for number, shard in enumerate(scheduler._shards)
        for page, name in shard.allocators[0]._names.items()
        if page not in shard._promised
    }


def random_prompt(rng: np.random.Generator) -> tuple[int, ...]:
    """A few prefixes, of a few lengths, with a few endings: many prompts share some pages, and some all of them."""
    prefix = np.random.default_rng(int(rng.integers(4))).integers(1, VOCAB, 5 * PAGE)[: int(rng.integers(0, 5 * PAGE))]
    return (*prefix.tolist(), *rng.integers(1, 4, int(rng.integers(1, PAGE))).tolist())


@pytest.mark.parametrize(
    ("num_shards", "num_slots", "max_pages", "num_steps", "in_flight"),
    [(1, 7, 40, 1, 1), (1, 16, 14, 1, 1), (2, 8, 12, 5, 1), (1, 5, 9, 8, 0)],
)
def test_thousands_of_requests_that_share_prefixes(num_shards, num_slots, max_pages, num_steps, in_flight):
    """Each as if alone, with cancellations before, during and after prefill, preemption and pages that are short."""
    rng = np.random.default_rng(num_slots)
    limits = limits_of(num_slots=num_slots // num_shards, max_length=8 * PAGE, max_step_tokens=5 * CHUNK)
    sizes = {"num_slots": num_slots, "num_shards": num_shards, "chunk_size": CHUNK, "max_chunks": 5}
    scheduler = Scheduler(limits, max_pages=max_pages, num_decode_steps=num_steps, prefix_cache=True, **sizes)
    batches, device = (
        BatchBuilder(limits, entry_multiple=4, **sizes),
        CheckedDevice(num_slots, num_shards, num_steps, [None]),
    )
    total, answers, cancelled, running, flying = 500, {}, set(), {}, []
    coming = iter(range(total))
    num_cached = num_prompt = 0

    def release(key: int) -> None:
        scheduler.release(running.pop(key))

    while True:
        while scheduler.num_waiting < 10 and (key := next(coming, None)) is not None:
            prompt = random_prompt(rng)
            params = SamplingParams(int(rng.integers(1, 8 * PAGE - len(prompt) + 1)))
            running[key] = scheduler.add(Request(key, prompt, params), len(prompt) + params.max_new_tokens - 1)
        if running and rng.random() < 0.1:
            key = list(running)[int(rng.integers(len(running)))]
            release(key)
            cancelled.add(key)
        if not running and not flying:
            break
        finished = finished_pages(scheduler)
        schedule = scheduler.schedule(can_preempt=not flying)
        assert schedule or flying, "stuck"
        for number, shard in enumerate(scheduler._shards):
            tables = [
                sequence.page_tables[0].pages(0, sequence.page_tables[0].num_pages - 1) for sequence in shard.sequences
            ]
            check_pages(shard.allocators[0], [table.tolist() for table in tables])
            assert all(sequence.shard == number for sequence in shard.sequences)
        if schedule:
            flying.append(device.run(batches.build(schedule, scheduler.num_pages)))
            # Those that have kept their names were not given to another sequence.
            kept = {(number, page) for number, page, _ in finished & finished_pages(scheduler)}
            assert not device.written & kept, "a finished page was written again"
        if len(flying) > in_flight or not schedule:
            for sequence, tokens in flying.pop(0):
                for token in tokens:
                    if sequence.is_finished:
                        break
                    sequence.tokens.append(token)
                    answer = sequence.tokens[len(sequence.request.prompt) :]
                    if token == STOP or len(answer) == sequence.request.params.max_new_tokens:
                        answers[sequence.request.key] = (sequence.request, answer)
                        num_cached, num_prompt = (
                            num_cached + sequence.num_cached_tokens,
                            num_prompt + len(sequence.request.prompt),
                        )
                        release(sequence.request.key)
        for live, held in zip(scheduler.num_live, scheduler.num_held_pages, strict=True):
            assert 0 <= live <= held * PAGE

    assert answers.keys() | cancelled == set(range(total)) and not answers.keys() & cancelled
    for request, answer in answers.values():
        assert answer == alone(request.prompt, request.params.max_new_tokens, [None])
    assert num_cached > num_prompt / 4
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_held_pages) == (0, 0, (0,))
    assert scheduler.num_live == (0,) and not any(shard._promised for shard in scheduler._shards)
    assert scheduler.num_preempted > 0 or max_pages == 40
    print(f"{total} requests, {num_cached} of {num_prompt} prompt tokens cached, {scheduler.num_preempted} preempted")


def request(key: int, *tokens: int, **params) -> Request:
    return Request(key, tokens, SamplingParams(**params))


SHARED = tuple(range(1, 2 * PAGE + 1))


def test_a_prompt_is_computed_once_in_the_step_that_needs_it_first():
    """Three sequences in one step: the second and the third compute only what they do not share."""
    scheduler = scheduler_of(prefix_cache=True)
    for key in range(3):
        scheduler.add(request(key, *SHARED, 50 + key, 60), 4 * PAGE)
    assert scheduled(scheduler) == [(0, 0, 2 * PAGE + 2), (1, 2 * PAGE, 2), (2, 2 * PAGE, 2)]
    assert scheduler.num_held_pages == (2 + 3,) and scheduler.num_live == (2 * PAGE + 3 * 2,)


def test_a_sequence_waits_for_pages_that_another_one_is_going_to_compute():
    scheduler = scheduler_of(prefix_cache=True, max_chunks=3)
    for key in range(2):
        scheduler.add(request(key, *SHARED, 50 + key), 4 * PAGE)
    assert scheduled(scheduler) == [(0, 0, 3 * CHUNK)]
    assert scheduled(scheduler) == [(0, 3 * CHUNK, CHUNK + 1), (1, 2 * PAGE, 1)]


def test_if_the_other_one_is_cancelled_it_computes_them_itself():
    scheduler = scheduler_of(prefix_cache=True, max_chunks=3)
    first, *_, third = [scheduler.add(request(key, *SHARED, 50 + key), 4 * PAGE) for key in range(3)]
    assert scheduled(scheduler) == [(0, 0, 3 * CHUNK)]
    scheduler.release(first)
    assert scheduler.num_waiting == 2
    # The first page of the two was finished.
    assert scheduled(scheduler) == [(1, PAGE, PAGE + 1)]
    assert third.prefill_start == 2 * PAGE


def test_the_last_token_is_computed_and_scored_prompts_are_computed_whole():
    scheduler = scheduler_of(prefix_cache=True)
    for key in range(2):
        scheduler.add(request(key, *SHARED), 4 * PAGE)
    scheduler.add(request(2, *SHARED, prompt_logprobs=0), 4 * PAGE)
    assert scheduled(scheduler) == [(0, 0, 2 * PAGE), (1, PAGE, PAGE), (2, 0, 2 * PAGE)]


def test_a_preempted_sequence_reads_its_own_pages():
    scheduler = scheduler_of(num_slots=2, max_pages=5, prefix_cache=True)
    for key in range(2):
        scheduler.add(request(key, *(key + 1,) * (2 * PAGE - 1)), 4 * PAGE - 1)
    first, second = (sequence for sequence, *_ in scheduler.schedule(can_preempt=True))
    for sequence in (first, second):
        sequence.tokens.append(1)
    while not scheduler.num_preempted:
        for sequence, _, count, *_ in scheduler.schedule(can_preempt=True):
            sequence.tokens += [1] * count
    scheduler.release(first)
    (sequence, start, count, *_), *_ = scheduler.schedule(can_preempt=True)
    assert sequence is second and start >= PAGE and start + count == len(second.tokens)
    assert second.num_cached_tokens == 0


def test_a_request_goes_to_the_shard_that_has_its_prefix():
    scheduler = scheduler_of(num_slots=8, num_shards=2, prefix_cache=True)
    one = scheduler.add(request(0, *SHARED, 50), 4 * PAGE)
    scheduler.schedule(can_preempt=True)
    other = scheduler.add(request(1, *SHARED, 51), 4 * PAGE)
    scheduler.schedule(can_preempt=True)
    assert one.shard != other.shard, "the shard of the first is the busier one"
    scheduler.release(one)
    again = scheduler.add(request(2, *SHARED, 52), 4 * PAGE)
    scheduler.schedule(can_preempt=True)
    assert again.shard == one.shard and again.prefill_start == 2 * PAGE


# --- schedules of models with recurrent layers ---

LONG = tuple(range(1, 5 * PAGE + 1))


def recurrent_scheduler(**changes) -> Scheduler:
    return scheduler_of(prefix_cache=True, **({"num_snapshots": 2, "max_chunks": 64} | changes))


def full_schedule(scheduler: Scheduler) -> list[tuple[int, int, int, int, tuple[SavedStates, ...]]]:
    """The next step of prefill: of each sequence the key and what is scheduled."""
    for _ in range(100):
        schedule = scheduler.schedule(can_preempt=True)
        if schedule and schedule[0].is_prefill:
            return [(one.sequence.request.key, *one[1:]) for one in schedule if one.is_prefill]
    raise AssertionError("no prefill")


def test_without_a_free_slot_prefill_stops_for_a_snapshot_and_others_begin_from_it_in_a_later_step():
    scheduler = recurrent_scheduler(num_slots=3)
    for key in range(3):
        scheduler.add(request(key, *LONG, 50 + key), 7 * PAGE)
    ((_, _, _, _, (saved,)),) = first = full_schedule(scheduler)
    assert first == [(0, 0, 5 * PAGE, -1, (saved,))]
    assert (saved.end, saved.slot) == (5 * PAGE, 0) and saved.snapshot >= 0
    expected = [(key, 5 * PAGE, 1, -1 if key == 0 else saved.snapshot, ()) for key in range(3)]
    assert full_schedule(scheduler) == expected


def test_with_a_free_slot_for_the_states_prefill_continues_in_the_same_step():
    scheduler = recurrent_scheduler(num_slots=4)
    for key in range(3):
        scheduler.add(request(key, *LONG, 50 + key), 7 * PAGE)
    ((_, _, _, _, (saved,)),) = first = full_schedule(scheduler)
    assert first == [(0, 0, 5 * PAGE + 1, -1, (saved,))]
    assert (saved.end, saved.slot) == (5 * PAGE, 3) and saved.snapshot >= 0
    assert full_schedule(scheduler) == [(key, 5 * PAGE, 1, saved.snapshot, ()) for key in (1, 2)]
    # The slot is still free, and the next sequence gets it.
    another = scheduler.add(request(3, 7), 2)
    full_schedule(scheduler)
    assert another.slot == saved.slot


def test_the_row_before_a_snapshot_has_the_slot_of_its_states():
    scheduler = recurrent_scheduler()
    scheduler.add(request(0, *LONG, 50), 7 * PAGE)
    schedule = scheduler.schedule(can_preempt=True)
    sizes = {"num_slots": 4, "num_shards": 1, "chunk_size": CHUNK, "max_chunks": 64, "entry_multiple": 4}
    builder = BatchBuilder(limits_of(num_slots=4), **sizes, has_snapshots=True)
    (batch,) = builder.build(schedule, scheduler.num_pages)
    (saved,) = schedule[0].saved
    rows = 5 * PAGE // CHUNK
    assert batch.saved_slots_B.tolist() == [4] * (rows - 1) + [saved.slot] + [4] * (len(batch.slots_B) - rows)
    assert batch.slots_B[: rows + 1].tolist() == [0] * (rows + 1) and batch.continues_B[rows]


def test_where_known_pages_branch_there_is_a_snapshot_for_those_who_come_next():
    scheduler = recurrent_scheduler()
    one, two, three = (LONG + (50 + key,) * (4 * PAGE) for key in range(3))
    for key, tokens in enumerate((one, two, three)):
        scheduler.add(request(key, *tokens), 10 * PAGE)
    # The first one's snapshot is at its end; the second one's is at the branch, and there is no room for another one.
    steps = [full_schedule(scheduler) for _ in range(2)]
    starts = {key: start for step in reversed(steps) for key, start, *_ in step}
    assert starts == {0: 0, 1: 0, 2: 5 * PAGE}
    assert sum(len(saved) for step in steps for *_, saved in step) == 2


def test_a_promised_snapshot_that_is_not_made_sends_those_that_wait_back():
    scheduler = recurrent_scheduler(max_chunks=2)
    first, *others = [scheduler.add(request(key, *LONG, 50 + key), 7 * PAGE) for key in range(3)]
    assert full_schedule(scheduler) == [(0, 0, 2 * CHUNK, -1, ())]
    assert [one.prefill_start for one in others] == [5 * PAGE, 5 * PAGE]
    scheduler.release(first)
    assert (scheduler.num_waiting, scheduler.num_held_pages) == (2, (0,))
    pool = scheduler._shards[0].snapshots
    assert (len(pool._unnamed), pool._promised, pool._idle.keys(), pool._holds) == (2, set(), set(), [0, 0])
    # The page that was finished is known, but there is no snapshot after it.
    assert full_schedule(scheduler) == [(1, 0, 2 * CHUNK, -1, ())]


def test_short_prefixes_make_no_snapshots_and_without_room_for_any_there_is_no_cache():
    scheduler = recurrent_scheduler()
    scheduler.add(request(0, *LONG[: 3 * PAGE], 50), 7 * PAGE)
    assert full_schedule(scheduler) == [(0, 0, 3 * PAGE + 1, -1, ())]
    scheduler = recurrent_scheduler(num_snapshots=0)
    for key in range(2):
        scheduler.add(request(key, *LONG, 50), 7 * PAGE)
    assert full_schedule(scheduler) == [(0, 0, 5 * PAGE + 1, -1, ()), (1, 0, 5 * PAGE + 1, -1, ())]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("pkbhr"), st.integers(0, 5)), max_size=60))
def test_every_snapshot_has_one_role(num_snapshots, operations):
    pool, promised, waiting = SnapshotPool(num_snapshots), [], []
    for kind, number in operations:
        name = bytes([number])
        if kind == "p" and (snapshot := pool.promise(name)) >= 0:
            assert snapshot not in promised and snapshot not in waiting
            promised.append(snapshot)
        elif kind == "k" and promised:
            pool.keep_promise(snapshot := promised.pop(number % len(promised)))
            assert not pool.can_read(snapshot)
            pool.begin_step()
            assert pool.can_read(snapshot)
        elif kind == "b" and promised:
            pool.break_promise(snapshot := promised.pop(number % len(promised)))
            for _ in range(waiting.count(snapshot)):
                pool.release(snapshot)
            waiting = [one for one in waiting if one != snapshot]
        elif kind == "h" and (found := pool.find([name]))[0]:
            pool.hold(found[1])
            waiting.append(found[1])
        elif kind == "r" and waiting:
            pool.release(waiting.pop(number % len(waiting)))
        roles = [*pool._unnamed, *pool._idle, *{*promised, *waiting}]
        assert sorted(roles) == list(range(num_snapshots)) and pool._promised == set(promised)
        assert [promised.count(one) + waiting.count(one) for one in range(num_snapshots)] == pool._holds
        assert pool._snapshots == {name: one for one, name in pool._names.items()}


def test_without_a_prefix_cache_and_with_windows_nothing_is_shared():
    for groups, is_on in (({None: 1}, False), ({None: 1, 5: 1}, True)):
        sizes = {"num_slots": 4, "max_pages": 64, "chunk_size": CHUNK, "max_chunks": 16}
        scheduler = Scheduler(limits_of(groups), prefix_cache=is_on, **sizes)
        for key in range(2):
            scheduler.add(request(key, *SHARED, 50), 4 * PAGE)
        assert [start for _, start, _ in scheduled(scheduler)] == [0, 0]
        assert not any(scheduler.num_cached_pages)


# --- real models ---


def test_a_state_is_copied_in_its_shard_and_no_other_changes():
    """Slot 1 of the second of two shards, of three slots each, to snapshot 3 there, of four."""
    states, snapshots = jnp.arange(12.0).reshape(2, 3, 2), jnp.zeros((2, 4, 2))
    copied = np.asarray(slots.copy(states, snapshots, jnp.array([6, 4]), jnp.array([8, 7])))
    assert copied[1, 3].tolist() == states[1, 1].tolist() and np.count_nonzero(copied) == 2


@pytest.fixture(scope="module")
def open_model(tiny_directory):
    @functools.cache
    def opened(family: str, mesh: str = "data=1"):
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        directory = tiny_directory(family, **sizes, **({"num_experts": 8} if "moe" in family else {}))
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
        return load_model(directory, sharding_ctx, dtype="float32"), Tokenizer.open(directory)

    return opened


def engine_of(opened, *, num_slots: int, num_pages: int, num_snapshots: int = 0, **options) -> Engine:
    """An engine with memory for this many pages and snapshots."""
    model, tokenizer = opened
    specs = state_specs(model.config, model.dtype)
    of_slot = slot_bytes(specs, model.sharding_ctx)
    left = num_pages * sum(page_bytes(specs, model.sharding_ctx)) + num_snapshots * of_slot
    fraction = (num_snapshots + 0.5) * of_slot / left
    slots_per_shard = num_slots // model.sharding_ctx.batch_multiple()
    sizes = {"max_batch_size": num_slots, "cache_bytes": left + slots_per_shard * of_slot, "snapshot_fraction": fraction}
    return Engine(model, tokenizer, **sizes, **options)


def answers_of(engine: Engine, requests: list[Request]) -> tuple[dict[int, list[int]], int]:
    """The tokens of each request, and how many tokens of their prompts were cached."""
    answers, num_cached = {one.key: [] for one in requests}, 0
    for update in engine.run(requests):
        answers[update.request.key] += update.tokens
        num_cached += update.num_cached_tokens if update.finish_reason is not None else 0
    return answers, num_cached


def random_requests(count: int, pages: range, *, has_processors: bool) -> list[Request]:
    """Prompts with a few prefixes of a few lengths. Some have penalties, which read the whole prompt."""
    rng = np.random.default_rng(count)
    prefixes = rng.integers(3, 300, (3, (pages.stop + 1) * BLOCK))
    requests = []
    for key in range(count):
        prefix = prefixes[rng.integers(3)][: BLOCK * int(rng.choice(pages)) + int(rng.integers(0, 3))]
        params = SamplingParams(
            max_new_tokens=int(rng.integers(1, 90)),
            temperature=float(rng.choice([0.0, 0.8])),
            seed=int(rng.integers(2**62)),
            repetition_penalty=float(rng.choice([1.0, 1.3])),
            frequency_penalty=float(rng.choice([0.0, 0.5])) if has_processors else 0.0,
            no_repeat_ngram_size=int(rng.choice([0, 2])) if has_processors else 0,
        )
        requests.append(Request(key, (*prefix.tolist(), *rng.integers(3, 300, int(rng.integers(1, 40))).tolist()), params))
    return requests


@pytest.mark.parametrize(
    ("family", "count", "num_slots", "num_pages", "num_snapshots", "pages", "mesh"),
    [
        pytest.param("qwen3", 60, 3, 9, 0, range(4), "data=1", marks=pytest.mark.slow),
        pytest.param("qwen3", 2000, 8, 20, 0, range(4), "data=1", marks=pytest.mark.slow),
        pytest.param("qwen3", 2000, 8, 12, 0, range(4), "data=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 60, 3, 9, 0, range(4), "data=1", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2000, 8, 20, 0, range(4), "data=1", marks=pytest.mark.slow),
        ("qwen3_5", 60, 3, 12, 4, range(3, 6), "data=1"),
        pytest.param("qwen3_5", 2000, 8, 26, 4, range(3, 7), "data=1", marks=pytest.mark.slow),
        pytest.param("qwen3_5", 120, 6, 12, 4, range(3, 6), "data=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_same_without_a_prefix_cache(
    open_model, family, count, num_slots, num_pages, num_snapshots, pages, mesh
):
    """With pages that are short: sequences are preempted, and cached pages and snapshots are given to others."""
    requests = random_requests(count, pages, has_processors=count > 60)
    sizes = {"num_slots": num_slots, "num_pages": num_pages, "num_snapshots": num_snapshots}
    expected, none_cached = answers_of(engine_of(open_model(family, mesh), **sizes, prefix_cache=False), requests)
    engine = engine_of(open_model(family, mesh), **sizes)
    found, num_cached = answers_of(engine, requests)
    num_prompt, load = sum(len(one.prompt) for one in requests), engine.stats
    print(f"{count} requests, {num_cached} of {num_prompt} prompt tokens cached, {load.num_preempted} preempted")
    assert found == expected
    assert none_cached == 0 and num_cached > num_prompt / 5 and load.num_preempted > 0
    assert load.held_positions == load.live_positions == 0 and load.cached_positions > 0


@pytest.mark.parametrize(("family", "num_slots"), [("qwen3", 1), ("qwen3_5", 1), ("qwen3_5", 2)])
def test_a_chat_computes_only_what_is_new_and_finished_pages_never_change(open_model, family, num_slots):
    """Three turns, each with the turns before in front. Without recurrent layers, the answer of a turn is cached, too."""
    sizes = {"num_slots": num_slots, "num_pages": 32, "num_snapshots": 4}
    engine = engine_of(open_model(family), **sizes)
    fresh = engine_of(open_model(family), **sizes, prefix_cache=False)
    rng, tokens, pages, ends = np.random.default_rng(3), [], {}, []
    for turn in range(3):
        num_before = len(tokens)
        tokens += rng.integers(3, 300, 4 * BLOCK + 5).tolist()
        (one,) = [Request(turn, tuple(tokens), SamplingParams(max_new_tokens=BLOCK))]
        answers, num_cached = answers_of(engine, [one])
        # The last token of an answer is sampled and not computed; snapshots are at the ends of prompts.
        expected = max(0, num_before - 1) // BLOCK if family == "qwen3" else ([0, *ends][-1] - 1) // BLOCK
        assert num_cached == max(0, expected) * BLOCK and (turn == 0 or num_cached >= 4 * BLOCK)
        assert answers == answers_of(fresh, [one])[0]
        list(engine.step())  # what was in flight when the answer ended
        before, pages = pages, {}
        for name, page in engine._scheduler._shards[0].allocators[0]._pages.items():
            arrays = [x for state in engine._state.states if isinstance(state, PagedState) for x in (state.k, state.v)]
            pages[name] = [np.asarray(x[0, page]).copy() for x in arrays]
            if name in before:
                assert all(map(np.array_equal, pages[name], before[name])), "a page changed"
        assert before.keys() <= pages.keys()
        ends.append(len(tokens))
        tokens += answers[turn]


def test_a_scored_prompt_gets_the_scores_of_all_its_tokens(open_model):
    engine = engine_of(open_model("qwen3"), num_slots=2, num_pages=16)
    prompt = tuple(np.random.default_rng(5).integers(3, 300, 2 * BLOCK + 9).tolist())
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    (before,) = engine.run([Request(0, prompt, params)])
    answers_of(engine, [Request(1, prompt, SamplingParams(max_new_tokens=2))])
    (after,) = engine.run([Request(2, prompt, params)])
    assert len(after.prompt_logprobs) == len(prompt) - 1 and after.num_cached_tokens == 0
    assert after.prompt_logprobs == before.prompt_logprobs
