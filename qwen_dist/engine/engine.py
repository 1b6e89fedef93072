"""From requests to text: requests come and go one by one, and all that are present are answered together.

The host decides and the devices compute: while one step runs, the host turns the tokens of the step before into text. From
them it also finds which tokens the answers with structured output may sample next, before the step that runs samples.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine.batch import Batch, BatchBuilder, StepBatches
from qwen_dist.engine.page_allocator import CacheLimits, PagedGroup
from qwen_dist.engine.request import Request, RequestOutput, TokenLogprob
from qwen_dist.engine.runner import DecodeState, Runner, SampledTokens, SamplingBatch, SamplingTable, StepLogits
from qwen_dist.engine.scheduler import POLICIES, Schedule, Scheduler
from qwen_dist.engine.sequence import Sequence
from qwen_dist.engine.structured_output import Constraint, Grammars, is_installed
from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.models.state import States, page_bytes, slot_bytes
from qwen_dist.models.state_spec import CacheDtype, LayerStateSpec, cache_groups
from qwen_dist.ops.paged_cache import MAX_ENTRIES, PAGE
from qwen_dist.runtime.processors import count_processors
from qwen_dist.sharding import ShardingContext
from qwen_dist.tokenizer import StopStrings, StreamDecoder, Tokenizer

# Prompts are computed in chunks of CHUNK_SIZE tokens, at most MAX_CHUNKS at a time in each data-parallel shard: enough to
# keep a device busy, with little padding. For latency on a CPU they have SHORT_CHUNK tokens, and there are more of them.
CHUNK_SIZE, MAX_CHUNKS, SHORT_CHUNK = 32, 16, 16
# Requests taken in for each that can be answered at a time: enough for the policy to choose from, few enough for memory.
TAKEN_AHEAD = 8
# The number of alternatives for which `Engine.warm_up` compiles the programs that score prompts.
_NUM_SCORED = 5


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """How full the engine is: requests, and positions of the cache that exist, that requests hold, and that are in use.

    Positions are the average over layers with pages, of which those with a window keep fewer. What several requests share
    counts once. `cached_positions` are those that no request holds and that a prefix cache keeps.
    """

    num_running: int
    num_waiting: int
    num_preempted: int
    cache_positions: int
    held_positions: int
    live_positions: int
    cached_positions: int = 0


class _ComputedStep(NamedTuple):
    """A step whose tokens are still to be sampled."""

    logits: StepLogits
    sampling: SamplingBatch
    has_logprobs: bool


_StartedBatch = tuple[Batch, SampledTokens | _ComputedStep]


def cache_limits(
    specs: Iterable[LayerStateSpec],
    sharding_ctx: ShardingContext,
    *,
    num_slots: int,
    max_length: int,
    num_decode_steps: int = 1,
) -> CacheLimits:
    """Return the limits of one shard with `num_slots` sequences of up to `max_length` positions each."""
    specs = tuple(specs)
    groups = zip(cache_groups(specs), page_bytes(specs, sharding_ctx), strict=True)
    return CacheLimits(
        [PagedGroup(group.window, len(group.layers), size) for group, size in groups],
        num_slots=num_slots,
        page_size=PAGE,
        max_length=max_length,
        max_step_tokens=max(CHUNK_SIZE * MAX_CHUNKS, num_decode_steps),
    )


def _num_snapshots(limits: CacheLimits, cache_bytes: int, of_slot: int, fraction: float) -> int:
    """Return how many snapshots of a shard's slots there is memory for, and use: not more than pages."""
    if not of_slot or not limits.can_share:
        return 0
    return min(int(fraction * cache_bytes) // of_slot, limits.largest(cache_bytes))


def _check_arguments(model: LoadedModel, tokenizer: Tokenizer, steps_per_dispatch: int, policy: str) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer knows ids up to {tokenizer.vocab_size - 1} and the model only {model.config.vocab_size}; "
            "tokenizer.json and config.json are not of the same checkpoint."
        )
    if not 1 <= steps_per_dispatch <= PAGE:
        raise UsageError(f"steps_per_dispatch is {steps_per_dispatch}; it must be from 1 to {PAGE}")
    if policy not in POLICIES:
        raise UsageError(f"engine.policy is {policy!r}; it must be one of {', '.join(POLICIES)}")


class Engine:
    """Answers requests, many at a time.

    Args:
      model, tokenizer: of one checkpoint.
      max_batch_size: requests at a time.
      cache_bytes: what the layers' states may grow to on each device.
      cache_dtype: of keys and values in the cache; None: the model's.
      steps_per_dispatch: tokens of a request before the host sees them, up to a page: more keep a fast device busy,
        fewer let requests that end make room sooner.
      policy: the order in which waiting requests are admitted: "throughput" (the longest prompt first) or "latency" (the
        first to come).
      prefix_cache: whether requests share the states of prompts that begin alike, and of earlier requests. Models with
        sliding windows have no prefix cache.
      snapshot_fraction: the part of the cache that may hold snapshots of recurrent layers' states, which the prefix cache
        of such a model needs.
      adapters: of a model with stacked adapters, the factors of each by its name (`checkpoint.adapter_layers`).

    Raises:
      UsageError: an argument is out of range, or the cache cannot hold a page.
      UserError: tokenizer and model are not of the same checkpoint.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 32,
        cache_bytes: int = 4 * 10**9,
        cache_dtype: CacheDtype | None = None,
        steps_per_dispatch: int = 1,
        policy: str = "throughput",
        prefix_cache: bool = True,
        snapshot_fraction: float = 0.2,
        adapters: Mapping[str, np.ndarray] = types.MappingProxyType({}),
    ):
        _check_arguments(model, tokenizer, steps_per_dispatch, policy)
        num_shards = model.sharding_ctx.batch_multiple()
        slots_per_shard = -(-max_batch_size // num_shards)
        num_slots = slots_per_shard * num_shards
        self.max_batch_size = max_batch_size
        self.max_context = model.config.max_position_embeddings
        self._tokenizer = tokenizer
        self._vocab_size = model.config.vocab_size
        self._runner = Runner(model, num_slots, steps_per_dispatch, cache_dtype=cache_dtype)
        self._sampling = SamplingTable(num_slots)
        specs = self._runner.specs
        self._limits = cache_limits(
            specs,
            model.sharding_ctx,
            num_slots=slots_per_shard,
            max_length=self.max_context,
            num_decode_steps=steps_per_dispatch,
        )
        sizes: dict[str, Any] = {"num_slots": num_slots, "num_shards": num_shards}
        self._overlaps = policy != "latency" or model.sharding_ctx.mesh.devices.flat[0].platform != "cpu"
        chunk_size = CHUNK_SIZE if self._overlaps else SHORT_CHUNK
        sizes |= {"chunk_size": chunk_size, "max_chunks": CHUNK_SIZE * MAX_CHUNKS // chunk_size}
        of_slot = slot_bytes(specs, model.sharding_ctx)
        left = cache_bytes - slots_per_shard * of_slot
        self._num_snapshots = _num_snapshots(self._limits, left, of_slot, snapshot_fraction * prefix_cache)
        programs = {"for_latency": policy == "latency", "has_snapshots": self._num_snapshots > 0}
        self._batches = BatchBuilder(self._limits, entry_multiple=MAX_ENTRIES, **programs, **sizes)
        max_pages = self._limits.largest(left - of_slot * self._num_snapshots)
        if max_pages < 1:
            raise UsageError(f"a cache of {cache_bytes} bytes on each device is less than one page; give more")
        sizes |= {"num_decode_steps": steps_per_dispatch, "prefix_cache": prefix_cache}
        sizes |= {"num_snapshots": self._num_snapshots if of_slot else None}
        self._scheduler = Scheduler(self._limits, max_pages=max_pages, policy=policy, **sizes)
        self._state: DecodeState | None = None
        self._snapshots: States | None = None
        self._num_pages: tuple[int, ...] = ()
        self._in_flight: list[tuple[Batch, SampledTokens]] | None = None
        self._has_delivered = False
        self._programs_sample = False  # the programs of greedy requests are smaller
        self._samples_apart = False  # whether what few requests want is sampled by the program that `warm_up` has compiled
        self._adapters = dict(adapters)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._answers: dict[Sequence, Detokenizer] = {}
        self._sequences: dict[int, list[Sequence]] = {}  # by the identity of their request

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""
        return not self._answers

    @property
    def stats(self) -> EngineStats:
        scheduler, num_shards = self._scheduler, self._runner.num_shards
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preempted=scheduler.num_preempted,
            cache_positions=self._mean_over_layers(scheduler.num_pages) * num_shards * PAGE,
            held_positions=self._mean_over_layers(scheduler.num_held_pages) * PAGE,
            live_positions=self._mean_over_layers(scheduler.num_live),
            cached_positions=self._mean_over_layers(scheduler.num_cached_pages) * PAGE,
        )

    def _mean_over_layers(self, by_group: tuple[int, ...]) -> int:
        """Return the average over all paged layers of what is counted for each cache group."""
        layers = [group.num_layers for group in self._limits.groups]
        return sum(map(operator.mul, by_group, layers)) // max(sum(layers), 1)

    def check(self, request: Request) -> None:
        """Check a request. Raises UserError if it cannot be run."""
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
        if any(token >= self._vocab_size for token, _ in request.params.logit_bias):
            raise UserError(f"logit_bias has token ids outside the vocabulary of {self._vocab_size}")
        if request.adapter and request.adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise UserError(f"there is no adapter {printable(request.adapter, 60)}; there is {printable(known)}")
        self._grammars.check(request.params)
        if not self._scheduler.fits(self._end(request)):
            raise UserError(
                f"the prompt has {length} tokens and the answer up to {request.params.max_new_tokens}, more than the cache "
                f"can hold ({self._scheduler.max_pages * PAGE} in each data-parallel shard); allow it more memory"
            )

    def warm_up(self, report: Callable[[int, int], None] = lambda done, total: None, *, for_all: bool = False) -> None:
        """Give the cache all of its memory and compile the programs, so that no request waits for that.

        Args:
          report: called with the number of programs that are compiled, and of all.
          for_all: also for requests with log-probabilities, biases, penalties or structured output. Without, their programs
            are compiled when the first of them comes.
        """
        self._programs_sample = True
        self._scheduler.reserve()
        steps = list(self._batches.empty_batches(self._scheduler.num_pages))
        if self._adapters or not self._runner.can_mix:
            steps = [batches for batches in steps if len(batches) == 1]
        dispatch_nothing = functools.partial(self._dispatch, [])
        dispatches = [functools.partial(dispatch_nothing, batches) for batches in steps]
        if for_all:
            alone = [batches for batches in steps if len(batches) == 1]
            scored = [batches for batches in alone if batches[0].is_prefill]
            dispatches += [functools.partial(dispatch_nothing, batches, num_scored=_NUM_SCORED) for batches in scored]
            dispatches += [functools.partial(dispatch_nothing, batches, apart=True, known=[(0, [0])]) for batches in alone]
        with ThreadPoolExecutor(count_processors()) as executor, self._runner.compiling(executor) as futures:
            for dispatch in dispatches:
                report(sum(future.done() for future in futures), len(dispatches))
                dispatch()
            for done, future in enumerate(as_completed(futures)):
                report(done, len(dispatches))
                future.result()
        for dispatch in dispatches:
            results = [self._sample(*started) for started in dispatch()]
            jax.block_until_ready(results)
        if for_all and is_installed():
            self._grammars.prepare()
        self._samples_apart = for_all
        report(len(dispatches), len(dispatches))

    def _end(self, request: Request) -> int:
        """Return the last position that a token of the answer may have; a prompt that is only scored has one too."""
        length, params = len(request.prompt), request.params
        if request.is_embedding:
            return length
        ends = (length + max(1, params.max_new_tokens), max(params.max_length or self.max_context, length + 1))
        return min(*ends, self.max_context) - 1

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises UserError if it fails `check`."""
        self.check(request)
        sequence = self._scheduler.add(request, self._end(request))
        constraint = self._grammars.constraint(request.params)
        self._answers[sequence] = Detokenizer(request, self._tokenizer, sequence.end, constraint)
        self._sequences.setdefault(id(request), []).append(sequence)

    def abort(self, request: Request) -> None:
        """Drop a request: no output follows. A request that has finished is ignored."""
        for sequence in list(self._sequences.get(id(request), ())):
            self._release(sequence)

    def abort_waiting(self) -> None:
        """Drop the requests that are not being answered at the moment."""
        for sequence in [sequence for sequence in self._answers if sequence.slot < 0]:
            self._release(sequence)

    def step(self) -> list[RequestOutput]:
        """Start the next step on the devices, and return the outputs of the step before it.

        For latency on a CPU, run one step and return its outputs: the host's work on a step would hardly be hidden by the
        next one, and a new request waits for one step less.
        """
        (before, self._in_flight), started = (self._in_flight, None), None
        # The very first output does not wait until the program of the next step has been compiled.
        if before is None or self._has_delivered:
            schedule = self._scheduler.schedule(can_preempt=before is None)
            if schedule:
                started = self._dispatch(schedule, self._batches.build(schedule, self._scheduler.num_pages))
        self._has_delivered |= before is not None
        outputs = [output for one in before or () for output in self._deliver(*one)]
        if started is None:
            return outputs
        sampled = [(batch, self._sample(batch, one)) for batch, one in started]
        if self._overlaps:
            self._in_flight = sampled
            return outputs
        return [output for one in sampled for output in self._deliver(*one)]

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Answer the requests; outputs come as text becomes final.

        Every request ends with one output that has a `finish_reason`. An answer depends on its request alone, not on the
        other requests (up to floating-point rounding, which in float32 practically never changes a token). Requests are
        taken from the iterable when there is room for them, and some ahead. Raises UserError if a request fails `check`.
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
        of_request = self._sequences[id(sequence.request)]
        of_request.remove(sequence)
        if not of_request:
            del self._sequences[id(sequence.request)]

    def _dispatch(
        self,
        schedule: Schedule,
        batches: StepBatches,
        *,
        apart: bool = False,
        num_scored: int | None = None,
        known: Iterable[tuple[int, list[int]]] = (),
    ) -> list[_StartedBatch]:
        """Start a step. Nothing is sampled if that must wait for the step before, or `apart` says so.

        `num_scored` and `known` are those of `Runner.compute`, where the batches have no sequences.
        """
        self._state = self._allocated_state()
        known = [*known, *self._begin(batches[0])]
        for scheduled in schedule:
            if scheduled.restored >= 0:
                assert self._snapshots is not None
                slot = scheduled.sequence.slot
                self._state = self._runner.restore(self._state, self._snapshots, slot, scheduled.restored)
        if len(batches) == 2 and not apart and self._can_mix(batches):
            started = self._start_mixed(batches, known)
        else:
            started = [
                self._start(batch, apart=apart, num_scored=num_scored, known=() if n else known)
                for n, batch in enumerate(batches)
            ]
        for states in (states for scheduled in schedule for states in scheduled.saved):
            snapshots = self._snapshots or self._runner.start_snapshots(self._num_snapshots)
            self._snapshots = self._runner.save(self._state, snapshots, states.slot, states.snapshot)
        return started

    def _allocated_state(self) -> DecodeState:
        """Return the state with the number of pages that the scheduler counts on."""
        before, self._num_pages = self._num_pages, self._scheduler.num_pages
        if self._state is None:
            return self._runner.start(self._num_pages)
        return self._state if before == self._num_pages else self._runner.resize(self._state, self._num_pages)

    def _begin(self, batch: Batch) -> Iterator[tuple[int, list[int]]]:
        """Note how the sequences of a prefill sample. Yield slots with the tokens before those that prefill computes."""
        if not batch.is_prefill:
            return
        for row, sequence in enumerate(batch.sequences):
            if sequence is None:
                continue
            self._sampling.set(sequence.slot, sequence.request, sequence.end)
            if 0 < sequence.prefill_start == batch.positions_BT[row, 0] and self._sampling.needs_tokens(sequence.slot):
                yield sequence.slot, sequence.tokens[: sequence.prefill_start]

    def _can_mix(self, batches: StepBatches) -> bool:
        """Return whether one program computes both batches: the one for requests that want nothing that few do."""
        if not self._runner.can_mix or self._adapters:
            return False
        return not any(
            (batch.is_prefill and self._sampling.num_scored(batch.slots_B) is not None)
            or self._is_special(batch)
            or self._needs_host(batch)
            for batch in batches
        )

    def _start_mixed(self, batches: tuple[Batch, Batch], known: list[tuple[int, list[int]]]) -> list[_StartedBatch]:
        assert self._state is not None
        samplings = [self._sampling_of(batch) for batch in batches]
        if not self._programs_sample:
            samplings = [sampling._replace(sampling=None) for sampling in samplings]
        self._state, sampled = self._runner.mixed_step(self._state, batches, (samplings[0], samplings[1]), known=known)
        return list(zip(batches, sampled, strict=True))

    def _sampling_of(self, batch: Batch, *, with_processors: bool = False) -> SamplingBatch:
        # Once a program has sampled, the next ones do too: otherwise two programs would be compiled for each size.
        self._programs_sample |= not self._sampling.are_greedy(batch.slots_B)
        return self._sampling.look_up(batch.slots_B, self._tokenizer.stop_ids, with_processors=with_processors)

    def _start(
        self, batch: Batch, *, apart: bool, num_scored: int | None, known: Iterable[tuple[int, list[int]]]
    ) -> _StartedBatch:
        assert self._state is not None
        num_top, known = self._sampling.num_top(batch.slots_B), list(known)
        if batch.is_prefill and num_scored is None:
            num_scored = self._sampling.num_scored(batch.slots_B, at_least=_NUM_SCORED if self._samples_apart else 0)
        apart = apart or num_scored is not None or self._must_sample_apart(batch)
        sampling = self._sampling_of(batch, with_processors=apart)
        if sampling.processors is None and not self._programs_sample:
            sampling = sampling._replace(sampling=None)
        adapters_BR = self._adapters_of_rows(batch)
        if not apart:
            self._state, sampled = self._runner.step(
                self._state, batch, sampling, num_top=num_top, known=known, adapters_BR=adapters_BR
            )
            return batch, sampled
        self._state, logits = self._runner.compute(
            self._state, batch, sampling, num_scored=num_scored, known=known, adapters_BR=adapters_BR
        )
        return batch, _ComputedStep(logits, sampling, num_top is not None)

    def _adapters_of_rows(self, batch: Batch) -> np.ndarray | None:
        if not self._adapters:
            return None
        none = np.zeros_like(next(iter(self._adapters.values())))
        names = ["" if sequence is None else sequence.request.adapter for sequence in batch.sequences]
        return np.stack([self._adapters.get(name, none) for name in names])

    def _must_sample_apart(self, batch: Batch) -> bool:
        return self._needs_host(batch) or (self._samples_apart and self._is_special(batch) and batch.num_steps == 1)

    def _is_special(self, batch: Batch) -> bool:
        """Return whether any row wants log-probabilities, or processors of logits."""
        return self._sampling.num_top(batch.slots_B) is not None or self._sampling.has_processors(batch.slots_B)

    def _needs_host(self, batch: Batch) -> bool:
        """Return whether the host must see the step before, or the hidden states, for any of the sequences."""
        requests = [sequence.request for sequence in batch.sequences if sequence is not None]
        return any(request.is_embedding or request.params.structured_outputs is not None for request in requests)

    def _sample(self, batch: Batch, started: SampledTokens | _ComputedStep) -> SampledTokens:
        """Sample the tokens of a step, if it has not done that yet. The tokens of the step before are known."""
        if isinstance(started, SampledTokens):
            return started
        assert self._state is not None
        logits, sampling, has_logprobs = started
        constraints: list[Constraint | None] = [None] * len(batch.sequences)
        for row, sequence in enumerate(batch.sequences):
            if sequence is not None and not sequence.is_finished and batch.logit_indices_BX[row, 0] >= 0:
                constraints[row] = self._answers[sequence].constraint
        self._state, sampled = self._runner.sample(
            self._state, batch, logits, sampling, self._grammars.allowed(constraints), has_logprobs=has_logprobs
        )
        has_embedding = any(sequence is not None and sequence.request.is_embedding for sequence in batch.sequences)
        return sampled._replace(scores=logits.scores, hidden_BD=logits.hidden_BD if has_embedding else None)

    def _deliver(self, batch: Batch, sampled: SampledTokens) -> Iterator[RequestOutput]:
        sampled = jax.device_get(sampled)
        for index, sequence in enumerate(batch.sequences):
            tokens = [token for token in sampled.tokens_SB[:, index].tolist() if token >= 0]
            if sequence is None or sequence.is_finished:
                continue
            answer = self._answers[sequence]
            if batch.is_prefill:
                answer.score(sampled, index, int(batch.positions_BT[index, 0]))
            if not tokens:
                continue
            if sequence.request.is_embedding:
                assert sampled.hidden_BD is not None
                self._release(sequence)
                yield _embedding(sequence, sampled.hidden_BD[index])
                continue
            logprobs = _logprobs(sampled, index, tokens, sequence.request.params.logprobs)
            output = answer.push(tokens, logprobs, sequence.num_cached_tokens)
            sequence.tokens += output.tokens
            if answer.constraint is not None:
                output = _constrained(output, answer.constraint)
            if output.finish_reason is not None:
                self._release(sequence)
            yield output


class Detokenizer:
    """The answer to one request: from tokens to text, and where it ends."""

    def __init__(self, request: Request, tokenizer: Tokenizer, end: int, constraint: Constraint | None = None):
        self.request, self.constraint = request, constraint
        self.max_new_tokens = min(end + 1 - len(request.prompt), request.params.max_new_tokens)
        self.num_generated = 0
        self.scores: list[TokenLogprob] = []
        specials = [id for text in request.params.stop if (id := tokenizer.special_id(text)) is not None]
        self._stop_ids = tokenizer.stop_ids.union(request.params.stop_token_ids, specials)
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(request.params.stop)

    def score(self, sampled: SampledTokens, index: int, start: int) -> None:
        """Keep the scores of the tokens after those from position `start` on, unless they are known.

        They are known when a preempted request prefills again.
        """
        num_top, prompt = self.request.params.prompt_logprobs, self.request.prompt
        if sampled.scores is None or num_top is None or start != len(self.scores):
            return
        following = prompt[start + 1 : start + 1 + sampled.scores[0].shape[1]]
        self.scores += _entries(tuple(x[index] for x in sampled.scores), following, num_top)

    def push(self, tokens: list[int], logprobs: list[TokenLogprob], num_cached_tokens: int = 0) -> RequestOutput:
        """Take sampled tokens up to the end; return the text that has become final, and why the answer ended if it did."""
        if self.max_new_tokens == 0:
            return RequestOutput(self.request, "", (), 0, "length", prompt_logprobs=tuple(self.scores))
        text, finish_reason, end_logprob = "", None, None
        for taken, token in enumerate(tokens, 1):
            self.num_generated += 1
            is_end = token in self._stop_ids
            text += "" if is_end else self._stops.push(self._decoder.push(token))
            if is_end or self._stops.stopped is not None:
                finish_reason = "stop"
            elif self.num_generated == self.max_new_tokens:
                finish_reason = "length"
            if finish_reason is not None:
                end_logprob = logprobs[taken - 1] if is_end and logprobs else None
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
        return RequestOutput(
            self.request,
            text,
            tuple(tokens),
            self.num_generated,
            finish_reason,
            tuple(logprobs),
            scores,
            num_cached_tokens,
            end_logprob=end_logprob,
        )


def _embedding(sequence: Sequence, hidden_D: Any) -> RequestOutput:
    embedding = tuple(np.asarray(hidden_D, np.float32).tolist())
    return RequestOutput(
        sequence.request, "", (), 0, "stop", num_cached_tokens=sequence.num_cached_tokens, embedding=embedding
    )


def _constrained(output: RequestOutput, constraint: Constraint) -> RequestOutput:
    """Show an output to the constraint of the answer. An answer whose parser has given up is cut, and says so."""
    if output.finish_reason is None:
        constraint.accept(output.tokens)
    is_cut = output.finish_reason == "stop" and constraint.has_failed
    return dataclasses.replace(output, finish_reason="length") if is_cut else output


def _logprobs(sampled: SampledTokens, index: int, tokens: list[int], num_top: int | None) -> list[TokenLogprob]:
    if sampled.logprobs is None or num_top is None:
        return []
    return _entries(tuple(x[:, index] for x in sampled.logprobs), tokens, num_top)


def _entries(logprobs: tuple[Any, ...], tokens: list[int] | tuple[int, ...], num_top: int) -> list[TokenLogprob]:
    """Return one entry for each token; `logprobs` as `sampling.log_probabilities` gives them, maybe of more tokens."""
    of_tokens, best_tokens, of_best = (np.asarray(x)[: len(tokens)].tolist() for x in logprobs)
    best = [tuple(zip(a[:num_top], b[:num_top], strict=True)) for a, b in zip(best_tokens, of_best, strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, of_tokens, best, strict=True)]
