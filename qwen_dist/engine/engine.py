"""From requests to text: batches of prompts are read in pieces and continued together, each row by its own rules.

The host decides and the devices compute: while a step runs, the tokens of the step before are turned into text here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine.request import Request, SamplingParams, TokenLogprob, Update
from qwen_dist.engine.runner import Chosen, Runner, State
from qwen_dist.errors import UserError
from qwen_dist.tokenizer import StopStrings, StreamDecoder, Tokenizer

# Tokens of all rows read at a time: enough to keep the devices busy, few enough to bound the activations.
PREFILL_TOKENS = 8192
MIN_CHUNK, MAX_CHUNK = 128, 512
# Each size is a program to compile, so sizes grow by doubling, from these: tokens read at a time, positions a row has room
# for, and positions that a step attends to (of those there is room for).
MIN_WIDTH, MIN_SLOTS, MIN_LIVE = 16, 64, 256


class Engine:
    """Generates text for batches of requests."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer, *, max_batch_size: int = 32):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer knows ids up to {tokenizer.vocab_size - 1} and the model only {model.config.vocab_size}; "
                "tokenizer.json and config.json are not of the same checkpoint."
            )
        self.max_batch_size = max_batch_size
        self.max_context = model.config.max_position_embeddings
        self._tokenizer = tokenizer
        self._runner = Runner(model)
        self._vocab_size = model.config.vocab_size
        self._batch_multiple = model.resolver.batch_multiple()

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

    def run(self, requests: Sequence[Request]) -> Iterator[Update]:
        """Answer the requests, longest prompts first, `max_batch_size` at a time; updates come as text becomes final.

        Every request ends with one update that has a `finish_reason`. An answer depends on its request alone, not on
        the rest of the batch (up to floating-point rounding, which in float32 practically never changes a token).
        Raises UserError, before anything runs, if a request fails `check`.
        """
        for request in requests:
            self.check(request)
        ordered = sorted(requests, key=lambda request: -len(request.prompt))
        for start in range(0, len(ordered), self.max_batch_size):
            yield from self._run_batch(ordered[start : start + self.max_batch_size])

    def _run_batch(self, requests: Sequence[Request]) -> Iterator[Update]:
        rows = [_Row(request, self._tokenizer, self.max_context) for request in requests]
        prompts = [request.prompt for request in requests]
        params = [request.params for request in requests]
        # Rows that only fill the batch up to a size the mesh can divide and that has been compiled before.
        fill = _batch_size(len(rows), self._batch_multiple) - len(rows)
        prompts += [(0,)] * fill
        params += [SamplingParams()] * fill

        wanted = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        num_top = max(wanted, default=None)
        chunk = min(MAX_CHUNK, max(MIN_CHUNK, PREFILL_TOKENS // len(prompts)))
        longest = max(len(row.request.prompt) + row.max_new_tokens for row in rows)
        pieces = list(_pieces(prompts, chunk))
        num_slots = max(_next_power_of_two(longest, MIN_SLOTS), pieces[-1].num_live)
        state = self._runner.start(prompts, params, num_slots)

        for piece in pieces:
            state, chosen = self._runner.prefill(state, *piece.arrays, num_live=piece.num_live, num_top=num_top)
            yield from self._deliver(rows, chosen, piece.last_B >= 0)
        yield from self._decode(rows, state, num_slots, num_top)

    def _decode(self, rows: list[_Row], state: State, num_slots: int, num_top: int | None) -> Iterator[Update]:
        """Steps until every row is done; the tokens of one step are read while the next one runs."""
        everyone = np.ones(len(rows), bool)
        reached = max(len(row.request.prompt) for row in rows) + 1
        running: Chosen | None = None
        while any(row.is_running for row in rows):
            num_live = min(_next_power_of_two(reached, MIN_LIVE), num_slots)
            ahead = None
            if any(row.is_running and row.num_generated + (running is not None) < row.max_new_tokens for row in rows):
                state, ahead = self._runner.decode(state, num_live=num_live, num_top=num_top)
                reached += 1
            if running is not None:
                yield from self._deliver(rows, running, everyone)
            running = ahead

    def _deliver(self, rows: list[_Row], chosen: Chosen, is_chosen: np.ndarray) -> Iterator[Update]:
        chosen = jax.device_get(chosen)
        for index, row in enumerate(rows):
            if row.is_running and is_chosen[index]:
                yield row.push(int(chosen.tokens_B[index]), _logprob(chosen, index, row.params.logprobs))


class _Row:
    """One request while it is being answered."""

    def __init__(self, request: Request, tokenizer: Tokenizer, max_context: int):
        self.request = request
        self.params = request.params
        self.max_new_tokens = min(self.params.max_new_tokens, max_context - len(request.prompt))
        self.num_generated = 0
        self.is_running = True
        self._stop_ids = tokenizer.stop_ids
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(self.params.stop)

    def push(self, token: int, logprob: TokenLogprob | None) -> Update:
        """Count a token in; what of the text has become final, and whether this was the end."""
        self.num_generated += 1
        is_end = token in self._stop_ids
        text = "" if is_end else self._stops.push(self._decoder.push(token))
        finish_reason = "stop" if is_end or self._stops.stopped is not None else None
        if finish_reason is None and self.num_generated >= self.max_new_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            self.is_running = False
            text += self._stops.push(self._decoder.flush())
            if self._stops.stopped is None:
                text += self._stops.flush()
            else:
                finish_reason = "stop"
        shown = () if logprob is None or is_end else (logprob,)
        return Update(self.request, text, (token,), self.num_generated, finish_reason, shown)


class _Piece:
    """The tokens from `start` on, `width` of every prompt, as arrays."""

    def __init__(self, prompts: Sequence[Sequence[int]], start: int, width: int):
        self.tokens_BT = np.zeros((len(prompts), width), np.int32)
        self.positions_BT = np.full((len(prompts), width), -1, np.int32)
        self.last_B = np.full(len(prompts), -1, np.int32)
        self.num_live = _next_power_of_two(start + width, MIN_SLOTS)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            self.tokens_BT[row, : len(part)] = part
            self.positions_BT[row, : len(part)] = range(start, start + len(part))
            if part and start + len(part) == len(prompt):
                self.last_B[row] = len(part) - 1

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.tokens_BT, self.positions_BT, self.last_B


def _pieces(prompts: Sequence[Sequence[int]], chunk: int) -> Iterator[_Piece]:
    longest = max(map(len, prompts))
    for start in range(0, longest, chunk):
        yield _Piece(prompts, start, min(chunk, _next_power_of_two(longest - start, MIN_WIDTH)))


def _logprob(chosen: Chosen, index: int, num_top: int | None) -> TokenLogprob | None:
    if chosen.logprobs is None or num_top is None:
        return None
    of_chosen, tokens, of_tokens = chosen.logprobs
    best = zip(tokens[index, :num_top].tolist(), of_tokens[index, :num_top].tolist(), strict=True)
    return TokenLogprob(int(chosen.tokens_B[index]), float(of_chosen[index]), tuple(best))


def _batch_size(num_rows: int, multiple: int) -> int:
    size = _next_power_of_two(num_rows, 1)
    return -(-size // multiple) * multiple


def _next_power_of_two(number: int, minimum: int) -> int:
    return max(minimum, 1 << (number - 1).bit_length())
