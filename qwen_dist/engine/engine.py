"""From requests to text: requests come and go one by one, and all that are there are answered together.

The host decides and the devices compute: while one step runs, the tokens of the step before are turned into text here.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine.request import Request, RequestOutput, TokenLogprob
from qwen_dist.engine.runner import DecodeState, Runner, SampledTokens, SamplingTable
from qwen_dist.engine.scheduler import Piece, Scheduler, Sequence, Steps
from qwen_dist.errors import UsageError, UserError
from qwen_dist.models.cache import PAGE, VISITS, page_bytes
from qwen_dist.tokenizer import StopStrings, StreamDecoder, Tokenizer

# Prompts are read in blocks of so many tokens, and each part of the mesh reads so many blocks at a time: enough to keep a
# device busy, with little padding.
BLOCK, NUM_BLOCKS = 32, 16
# Requests taken in for each that can be answered at a time: enough to choose from, few enough to hold in memory.
TAKEN_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """How full the engine is: requests, and positions of the cache: that there are, that requests hold, and in use.

    Of positions it is the average over layers, of which those with a window keep fewer.
    """

    num_running: int
    num_waiting: int
    num_preempted: int
    cache_positions: int
    held_positions: int
    live_positions: int


class Engine:
    """Answers requests, many at a time.

    Args:
      model, tokenizer: of one checkpoint.
      max_batch_size: requests at a time.
      cache_bytes: what the cache may grow to on each device.
      steps_per_dispatch: tokens of a request before the host sees them, up to a page: more keep a fast device busy,
        fewer let requests that end make room sooner.

    Raises:
      UsageError: a number is out of range, or the cache cannot hold a page.
      UserError: tokenizer and model are not of the same checkpoint.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 32,
        cache_bytes: int = 4 * 10**9,
        steps_per_dispatch: int = 1,
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer knows ids up to {tokenizer.vocab_size - 1} and the model only {model.config.vocab_size}; "
                "tokenizer.json and config.json are not of the same checkpoint."
            )
        if not 1 <= steps_per_dispatch <= PAGE:
            raise UsageError(f"steps_per_dispatch is {steps_per_dispatch}; it must be from 1 to {PAGE}")
        parts = model.sharding_ctx.batch_multiple()
        num_rows = -(-max_batch_size // parts) * parts
        self.max_batch_size = max_batch_size
        self.max_context = model.config.max_position_embeddings
        self._tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._layers = tuple(model.config.windows.values())
        self._runner, self._rules = Runner(model, num_rows, steps_per_dispatch), SamplingTable(num_rows)
        self._scheduler = Scheduler(
            num_rows=num_rows,
            page_size=PAGE,
            block_size=BLOCK,
            max_pages=cache_bytes // page_bytes(model.config, model.sharding_ctx, model.dtype),
            max_length=self.max_context,
            kinds=model.config.windows,
            parts=parts,
            num_blocks=NUM_BLOCKS,
            num_steps=steps_per_dispatch,
            group=VISITS,
        )
        if self._scheduler.max_pages < 1:
            raise UsageError(f"a cache of {cache_bytes} bytes on each device is less than one page; give more")
        self._state: DecodeState | None = None
        self._num_pages: tuple[int, ...] = ()
        self._in_flight: tuple[Piece | Steps, SampledTokens] | None = None
        self._has_delivered = False
        self._answers: dict[Sequence, _Answer] = {}

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""
        return not self._answers

    @property
    def stats(self) -> EngineStats:
        scheduler, parts = self._scheduler, self._runner.parts
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preempted=scheduler.num_preempted,
            cache_positions=self._of_a_layer(scheduler.num_pages) * parts * PAGE,
            held_positions=self._of_a_layer(scheduler.num_held_pages) * PAGE,
            live_positions=self._of_a_layer(scheduler.num_live),
        )

    def _of_a_layer(self, by_kind: tuple[int, ...]) -> int:
        """The average over all layers of what is counted for each kind of them."""
        return sum(map(operator.mul, by_kind, self._layers)) // sum(self._layers)

    def check(self, request: Request) -> None:
        """Raises UserError if the request cannot be run."""
        length = len(request.prompt)
        if length == 0:
            raise UserError("the prompt is empty; give at least one token")
        if length >= self.max_context:
            raise UserError(
                f"the prompt has {length} tokens and the model's context {self.max_context}, "
                "which must also hold the answer; shorten the prompt"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocab_size:
            raise UserError(f"the prompt has token ids outside the vocabulary of {self._vocab_size}")
        if not self._scheduler.fits(self._end(request)):
            raise UserError(
                f"the prompt has {length} tokens and the answer up to {request.params.max_new_tokens}, more than the cache "
                f"can grow to hold ({self._scheduler.max_pages * PAGE} on each part of the mesh); allow it more memory"
            )

    def _end(self, request: Request) -> int:
        """The last position that a token of the answer may have; there is one even if the prompt is only scored."""
        return min(len(request.prompt) + max(1, request.params.max_new_tokens), self.max_context) - 1

    def add_request(self, request: Request) -> None:
        """Let a request wait for its turn. Raises UserError if it fails `check`."""
        self.check(request)
        sequence = self._scheduler.add(request, self._end(request))
        self._answers[sequence] = _Answer(request, self._tokenizer, sequence.end)

    def abort(self, request: Request) -> None:
        """Nothing more comes of a request; one that has ended is no matter."""
        for sequence in [sequence for sequence in self._answers if sequence.request is request]:
            self._release(sequence)

    def abort_waiting(self) -> None:
        """Nothing comes of the requests that are not being answered just now."""
        for sequence in [sequence for sequence in self._answers if sequence.row < 0]:
            self._release(sequence)

    def step(self) -> list[RequestOutput]:
        """Start the next step on the devices, and return what the one before it gave."""
        before, self._in_flight = self._in_flight, None
        # The first result of all is not kept waiting until the program of the next step has been made.
        if before is None or self._has_delivered:
            plan = self._scheduler.plan(can_preempt=before is None)
            self._in_flight = None if plan is None else (plan, self._dispatch(plan))
        self._has_delivered |= before is not None
        return [] if before is None else list(self._deliver(*before))

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Answer the requests, longest prompts first; updates come as text becomes final.

        Every request ends with one update that has a `finish_reason`. An answer depends on its request alone, not on
        what else is answered (up to floating-point rounding, which in float32 practically never changes a token). Requests
        are taken from the iterable as there is room for them, some ahead. Raises UserError if a request fails `check`.
        """
        coming, ahead = iter(requests), self.max_batch_size * TAKEN_AHEAD
        try:
            while True:
                for request in itertools.islice(coming, max(0, ahead - len(self._answers))):
                    self.add_request(request)
                if self.is_idle:
                    break
                yield from self.step()
        finally:
            for sequence in list(self._answers):
                self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        del self._answers[sequence]

    def _dispatch(self, plan: Piece | Steps) -> SampledTokens:
        num_pages = self._scheduler.num_pages
        if self._state is None:
            self._state = self._runner.start(num_pages)
        elif num_pages != self._num_pages:
            self._state = self._runner.resize(self._state, num_pages)
        self._num_pages = num_pages
        if isinstance(plan, Piece):
            for sequence in plan.sequences:
                if sequence is not None:
                    self._rules.set(sequence.row, sequence.request.params, sequence.end)
        rules, num_top = self._rules.look_up(plan.rows_B, self._tokenizer.stop_ids), self._rules.num_top(plan.rows_B)
        if isinstance(plan, Piece):
            num_scored = self._rules.num_scored(plan.rows_B)
            self._state, chosen = self._runner.read(self._state, plan, rules, num_top=num_top, num_scored=num_scored)
        else:
            self._state, chosen = self._runner.step(self._state, plan, rules, num_top=num_top)
        return chosen

    def _deliver(self, plan: Piece | Steps, chosen: SampledTokens) -> Iterator[RequestOutput]:
        chosen = jax.device_get(chosen)
        for index, sequence in enumerate(plan.sequences):
            tokens = [token for token in chosen.tokens_XB[:, index].tolist() if token >= 0]
            if sequence is None or sequence.is_over:
                continue
            answer = self._answers[sequence]
            if isinstance(plan, Piece):
                answer.score(chosen, index, int(plan.positions_BT[index, 0]))
            if not tokens:
                continue
            logprobs = _logprobs(chosen, index, tokens, sequence.request.params.logprobs)
            update = answer.push(tokens, logprobs)
            sequence.tokens += update.tokens
            if update.finish_reason is not None:
                self._release(sequence)
            yield update


class _Answer:
    """One request while it is being answered: from tokens to text."""

    def __init__(self, request: Request, tokenizer: Tokenizer, end: int):
        self.request = request
        self.max_new_tokens = min(end + 1 - len(request.prompt), request.params.max_new_tokens)
        self.num_generated = 0
        self.scores: list[TokenLogprob] = []
        self._stop_ids = tokenizer.stop_ids
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(request.params.stop)

    def score(self, chosen: SampledTokens, index: int, start: int) -> None:
        """Take the scores of the tokens that follow those from position `start` on, unless they are known.

        They are when a request that had given its pages back is read again.
        """
        num_top, prompt = self.request.params.prompt_logprobs, self.request.prompt
        if chosen.scores is None or num_top is None or start != len(self.scores):
            return
        following = prompt[start + 1 : start + 1 + chosen.scores[0].shape[1]]
        self.scores += _entries(tuple(x[index] for x in chosen.scores), following, num_top)

    def push(self, tokens: list[int], logprobs: list[TokenLogprob]) -> RequestOutput:
        """Count tokens in, up to the end; what of the text has become final, and whether there was the end."""
        if self.max_new_tokens == 0:
            return RequestOutput(self.request, "", (), 0, "length", prompt_logprobs=tuple(self.scores))
        text, finish_reason = "", None
        for taken, token in enumerate(tokens, 1):
            self.num_generated += 1
            is_end = token in self._stop_ids
            text += "" if is_end else self._stops.push(self._decoder.push(token))
            if is_end or self._stops.stopped is not None:
                finish_reason = "stop"
            elif self.num_generated == self.max_new_tokens:
                finish_reason = "length"
            if finish_reason is not None:
                logprobs = logprobs[: taken - is_end]
                tokens = tokens[:taken]
                break
        if finish_reason is not None:
            text += self._stops.push(self._decoder.flush())
            if self._stops.stopped is None:
                text += self._stops.flush()
            else:
                finish_reason = "stop"
        scores = () if finish_reason is None else tuple(self.scores)
        return RequestOutput(self.request, text, tuple(tokens), self.num_generated, finish_reason, tuple(logprobs), scores)


def _logprobs(chosen: SampledTokens, index: int, tokens: list[int], num_top: int | None) -> list[TokenLogprob]:
    if chosen.logprobs is None or num_top is None:
        return []
    return _entries(tuple(x[:, index] for x in chosen.logprobs), tokens, num_top)


def _entries(logprobs: tuple[Any, ...], tokens: list[int] | tuple[int, ...], num_top: int) -> list[TokenLogprob]:
    """The first of these, as many as there are tokens; `logprobs` as `sampling.log_probabilities` gives them."""
    of_tokens, best_tokens, of_best = (np.asarray(x)[: len(tokens)].tolist() for x in logprobs)
    best = [tuple(zip(a[:num_top], b[:num_top], strict=True)) for a, b in zip(best_tokens, of_best, strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, of_tokens, best, strict=True)]
