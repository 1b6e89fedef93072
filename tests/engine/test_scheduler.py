"""Plans for thousands of requests, carried out by a device that is a dictionary: nothing is stuck, lost or mixed up."""

import numpy as np
import pytest

from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.scheduler import NOWHERE, Piece, Scheduler, Steps

PAGE, BLOCK, VOCAB, STOP = 8, 4, 97, 0


class Device:
    """What the programs of the runner do, on lists: what a token attends to is hashed into the next token.

    Every slot of the cache holds the token that was written there, so that a wrong page, a wrong position or a slot that
    another sequence has written over gives another answer than the request has alone.
    """

    def __init__(self, scheduler: Scheduler, parts: int, max_steps: int, windows):
        self.scheduler, self.parts, self.max_steps, self.windows = scheduler, parts, max_steps, windows
        self.slots: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        self.tokens, self.positions, self.are_over, self.ends = {}, {}, {}, {}

    def run(self, plan: Piece | Steps) -> list[list[int]]:
        return self._read(plan) if isinstance(plan, Piece) else self._continue(plan)

    def _seen(self, tables, part: int, index: int, position: int) -> list[int]:
        """The tokens that row `index` of a part finds on the pages of each kind, up to its own position."""
        tokens = []
        for kind, (table, window) in enumerate(zip(tables, self.windows, strict=True)):
            visits, first = table.visits, 0 if window is None else max(0, position - window + 1)
            seen = []
            for e in range(int(visits.num_visits)):
                if visits.row_DE[part, e] == index and visits.start_DE[part, e] < NOWHERE:
                    start, page = int(visits.start_DE[part, e]), int(visits.page_DE[part, e])
                    assert start + PAGE > first - self.max_steps, "a page behind the window"
                    there = range(max(start, first), min(start + PAGE, position + 1))
                    seen += [self.slots[kind, part, page, at - start] for at in there]
            assert [p for p, _ in sorted(seen)] == list(range(first, position + 1))
            tokens += [token for _, token in sorted(seen)]
        return tokens

    def _write(self, tables, b: int, part: int, column: int, position: int, token: int) -> None:
        for kind, table in enumerate(tables):
            self.slots[kind, part, int(table.pages_BN[b, column]), position % PAGE] = (position, token)

    def _read(self, piece: Piece) -> list[list[int]]:
        width = len(piece.rows_B) // self.parts
        for b, sequence in enumerate(piece.sequences):
            if sequence is not None:
                self.ends[int(piece.rows_B[b])] = sequence.end
            for token, position in zip(piece.tokens_BT[b], piece.positions_BT[b], strict=True):
                if position >= 0:
                    self._write(piece.tables, b, b // width, 0, int(position), int(token))
        chosen = []
        for b, row in enumerate(piece.rows_B.tolist()):
            chosen.append([])
            if piece.last_B[b] >= 0:
                position = int(piece.positions_BT[b, piece.last_B[b]])
                chosen[b].append(self._move(row, self._seen(piece.tables, b // width, b % width, position), position + 1))
        return chosen

    def _continue(self, steps: Steps) -> list[list[int]]:
        assert 1 <= steps.num_steps <= self.max_steps
        width = len(steps.rows_B) // self.parts
        chosen: list[list[int]] = [[] for _ in steps.rows_B]
        for _ in range(steps.num_steps):
            for b, row in enumerate(steps.rows_B.tolist()):
                if row < self.scheduler.num_rows and not self.are_over[row]:
                    position = self.positions[row]
                    column = position // PAGE - int(steps.first_B[b])
                    self._write(steps.tables, b, b // width, column, position, self.tokens[row])
                    seen = self._seen(steps.tables, b // width, b % width, position)
                    chosen[b].append(self._move(row, seen, position + 1))
        return chosen

    def _move(self, row: int, seen: list[int], position: int) -> int:
        token = next_token(seen)
        self.tokens[row], self.positions[row] = token, position
        self.are_over[row] = token == STOP or position >= self.ends[row]
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
    ("parts", "rows", "max_pages", "num_steps", "in_flight", "kinds"),
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
def test_thousands_of_requests_each_as_if_alone(parts, rows, max_pages, num_steps, in_flight, kinds):
    """Lengths, limits, stops on the device, stops that only the host sees, cancellations; pages short and plenty."""
    rng = np.random.default_rng(rows)
    scheduler = Scheduler(
        num_rows=rows,
        page_size=PAGE,
        block_size=BLOCK,
        max_pages=max_pages,
        max_length=8 * PAGE,
        kinds=kinds,
        parts=parts,
        num_blocks=5,
        num_steps=num_steps,
        group=4,
    )
    device = Device(scheduler, parts, num_steps, list(kinds))
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
        plan = scheduler.plan(can_preempt=not flying)
        num_plans += 1
        assert plan is not None or flying, "stuck"
        if plan is not None:
            flying.append((plan, device.run(plan)))
        if len(flying) > in_flight or plan is None:
            done, chosen = flying.pop(0)
            for sequence, tokens in zip(done.sequences, chosen, strict=True):
                for token in tokens:
                    if sequence.is_over:
                        break
                    sequence.tokens.append(token)
                    answer = sequence.tokens[len(sequence.request.prompt) :]
                    stopped = bool(sequence.request.params.stop) and len(answer) == 3
                    if token == STOP or stopped or len(answer) == sequence.request.params.max_new_tokens:
                        answers[sequence.request.key] = (sequence.request, answer)
                        scheduler.release(sequence)
                        del running[sequence.request.key]
        most_running = max(most_running, scheduler.num_running)
        layers = np.array(list(kinds.values()))
        assert layers @ scheduler.num_pages <= layers.sum() * max_pages
        for window, live, held in zip(kinds, scheduler.num_live, scheduler.num_held_pages, strict=True):
            assert 0 <= live <= held * PAGE
            # A window before the first token of a piece of 5 blocks, and these, which may begin anywhere on a page.
            assert window is None or held <= scheduler.num_running * (-(-(window + 5 * BLOCK - 2) // PAGE) + 1)

    assert answers.keys() | cancelled == set(range(total)) and not answers.keys() & cancelled
    for request, answer in answers.values():
        expected = alone(request.prompt, request.params.max_new_tokens, kinds)
        assert answer == (expected[:3] if request.params.stop else expected)
    assert most_running == rows or scheduler.num_preempted > 0
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert not any(scheduler.num_held_pages) and not any(scheduler.num_live)
    print(f"{total} requests: {len(answers)} answered, {len(cancelled)} cancelled, {scheduler.num_preempted} preempted, ")
    print(f"{num_plans} plans, at most {most_running} at a time; pool empty")


def scheduler_of(**changes) -> Scheduler:
    sizes = {"num_rows": 4, "page_size": PAGE, "block_size": BLOCK, "max_pages": 64, "max_length": 64, "kinds": {None: 1}}
    return Scheduler(**sizes | changes)


def test_longer_prompts_come_first():
    scheduler = scheduler_of(num_rows=2, num_blocks=3)
    for length in (3, 9, 5):
        scheduler.add(Request(length, tuple(range(1, length + 1)), SamplingParams()), 20)
    piece = scheduler.plan(can_preempt=True)
    assert [sequence.request.key for sequence in piece.sequences] == [9, 9, 9]
    assert piece.last_B.tolist() == [-1, -1, 0]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_reading_and_continuing_take_turns():
    """With half of the rows read, a long prompt that comes does not stop the others."""
    scheduler = scheduler_of(num_blocks=2)
    for key in range(3):
        scheduler.add(Request(key, (1, 2), SamplingParams()), 40)
    kinds = [type(scheduler.plan(can_preempt=True)) for _ in range(3)]
    assert kinds == [Piece, Steps, Piece]  # three blocks are two pieces, and two rows do not wait for one
    scheduler.add(Request(3, tuple(range(1, 33)), SamplingParams()), 60)
    kinds = [type(scheduler.plan(can_preempt=True)) for _ in range(8)]
    assert kinds == [Steps, Piece] * 4


def test_the_pool_grows_with_what_is_there_and_not_further():
    scheduler = scheduler_of()
    assert scheduler.num_pages == (0,)
    scheduler.add(Request(0, (1,), SamplingParams()), 30)
    scheduler.plan(can_preempt=True)
    assert (scheduler.num_pages, scheduler.num_held_pages) == ((16,), (1,))
    for key in range(1, 4):
        scheduler.add(Request(key, (1,) * 47, SamplingParams()), 60)
    scheduler.plan(can_preempt=True)
    assert (scheduler.num_pages, scheduler.num_held_pages) == ((32,), (19,))


def test_memory_is_divided_so_that_a_window_never_runs_out_first():
    """Memory for 64 pages in each of 4 layers is for 256; 3 layers need 3 pages for each of 4 rows, the one has the rest.

    3, because the 8 tokens of a piece and the 4 that its first one sees before it may begin anywhere on a page of 8.
    """
    scheduler = scheduler_of(kinds={None: 1, 5: 3}, num_blocks=2, max_length=1000)
    assert scheduler.max_pages == 256 - 3 * 12
    assert scheduler.fits(1000)
    small = scheduler_of(kinds={None: 1, 5: 3}, num_blocks=2, max_pages=1)
    assert small.fits(PAGE) and not small.fits(PAGE + 1)


def test_what_never_fits_is_known_before():
    scheduler = scheduler_of(max_pages=4)
    assert scheduler.fits(4 * PAGE) and not scheduler.fits(4 * PAGE + 1)
