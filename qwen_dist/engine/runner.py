"""Every jitted function of inference.

Letters: B rows of a step, T tokens of a row, X = 1 token of a row after which one is sampled, M slots, V vocab, S steps of
one dispatch, W words of 32 tokens each.

A step is one program, which computes and samples: chunks of prompts, rows that decode, or both. If every request is greedy,
it is a smaller one. Where the host must see the tokens of the step before first, or a request wants what few do, it is two:
`compute` and `sample`. The second is small, and one for all that a request can want.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine import logits_processors, token_presence
from qwen_dist.engine.batch import Batch
from qwen_dist.engine.logits_processors import ProcessorArrays
from qwen_dist.engine.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from qwen_dist.engine.sampling import SamplingArrays, apply_repetition_penalty, log_probabilities, restrict, sample
from qwen_dist.models.layers import take_positions
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.state import States, constrain_states, empty_states, resized_states, state_axes
from qwen_dist.models.state_spec import CacheDtype, RecurrentSpec
from qwen_dist.models.transformer import Transformer, state_specs
from qwen_dist.ops import slots
from qwen_dist.ops.adapter_rows import adapter_factors
from qwen_dist.ops.argmax import allowed_argmax, argmax, unpack_allowed
from qwen_dist.ops.loop import bounded_loop
from qwen_dist.ops.paged_cache import MAX_ENTRIES, PageIndices
from qwen_dist.ops.step_rows import StepIndices, StepRows
from qwen_dist.runtime.settings import compiler_options
from qwen_dist.sharding import use_sharding

NUM_STOP_IDS = 16
NUM_TOPS = (0, 5, MAX_TOP_LOGPROBS)
# Tokens of each row of a scored prompt whose logits exist at a time.
SCORED_AT_A_TIME = 8
# Tokens of a slot that `_add_known` adds at a time.
KNOWN_AT_A_TIME = 512


class DecodeState(NamedTuple):
    """What is kept from step to step, all of it on the devices and donated to each step.

    Attributes:
      states: what each layer keeps.
      last_tokens_M: the token that was sampled last in each slot; the layers' states do not include it yet.
      finished_M: whether the slot's sequence has sampled a stop token or reached its last position.
      token_presence_MV: the table of `engine.token_presence`; None in programs of greedy requests.
      history_ML: the tokens of slots whose requests use `engine.logits_processors`; None in programs without them.
    """

    states: States
    last_tokens_M: jax.Array
    finished_M: jax.Array
    token_presence_MV: jax.Array | None
    history_ML: jax.Array | None = None


class SamplingBatch(NamedTuple):
    """How B rows sample and when they end: `end_B` the last position a token may have, `stop_ids` padded with -1.

    `processors` is None if no row uses any; `sampling` is None if, moreover, every row is greedy. The program then has no
    such part.
    """

    sampling: SamplingArrays | None
    end_B: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray
    processors: ProcessorArrays | None = None


class StepArrays(NamedTuple):
    """`batch.Batch`, without what only the host needs; for decode without tokens, which the devices have.

    `adapters_BR` has the factors of `ops.adapter_rows`, in an engine with adapters.
    """

    tokens_BT: jax.Array | np.ndarray | None
    positions_BT: jax.Array | np.ndarray
    next_tokens_BT: jax.Array | np.ndarray | None
    num_steps: jax.Array | np.ndarray
    indices: StepIndices
    adapters_BR: jax.Array | np.ndarray | None = None

    @classmethod
    def of(cls, batch: Batch, adapters_BR: np.ndarray | None = None) -> StepArrays:
        pages = tuple(PageIndices(*arrays) for arrays in batch.pages)
        num_steps = np.array(batch.num_steps, np.int32)
        if not batch.is_prefill:
            return cls(None, batch.positions_BT, None, num_steps, StepIndices(batch.slots_B, pages), adapters_BR)
        indices = StepIndices(batch.slots_B, pages, batch.logit_indices_BX, batch.continues_B, batch.saved_slots_B)
        return cls(batch.tokens_BT, batch.positions_BT, batch.next_tokens_BT, num_steps, indices, adapters_BR)


LogProbs = tuple[jax.Array, jax.Array, jax.Array]


class StepLogits(NamedTuple):
    """What a step has computed before anything is sampled.

    Attributes:
      logits_BV: of the next token of each row.
      hidden_BD: the last layer's normalised output at the token before it.
      next_B: the position of the next token.
      is_sampled_B: whether there is a next token: the row is no padding, its sequence has not ended, its prompt ends here.
      scores: see `SampledTokens`.
    """

    logits_BV: jax.Array
    hidden_BD: jax.Array
    next_B: jax.Array
    is_sampled_B: jax.Array
    scores: LogProbs | None = None


class SampledTokens(NamedTuple):
    """The tokens of each step [S, B], -1 where there is none, and if asked for their `log_probabilities`.

    `scores` are those of the token after each token of a prompt [B, T], `hidden_BD` the hidden states before the tokens, if
    asked for.
    """

    tokens_SB: jax.Array
    logprobs: LogProbs | None
    scores: LogProbs | None = None
    hidden_BD: jax.Array | None = None


class Runner:
    """The compiled programs for one model on one mesh: prefill, decode, and the state between them."""

    def __init__(self, model: LoadedModel, num_slots: int, max_steps: int = 1, *, cache_dtype: CacheDtype | None = None):
        self._model, self._num_slots, self._max_steps = model, num_slots, max_steps
        self.specs = state_specs(model.config, model.dtype, cache_dtype)
        self.num_shards = model.sharding_ctx.batch_multiple()
        mesh = model.sharding_ctx.mesh
        options: dict[str, Any] = {
            "compiler_options": compiler_options(mesh.devices.flat[0].platform, mesh.size, "inference")
        }
        self._prefill = jax.jit(self._run_prefill, donate_argnames="state", static_argnames="num_top", **options)
        self._decode = jax.jit(self._run_decode, donate_argnames="state", static_argnames="num_top", **options)
        self._mixed = jax.jit(self._run_mixed, donate_argnames="state", **options)
        # A step of rows of two lengths has no length to shard.
        self.can_mix = model.sharding_ctx.num_shards("length") == 1
        # Arrays that come from several programs have one spelling of their sharding: another one is compiled for again.
        replicated: Any = model.sharding_ctx.replicated()
        presence: Any = self._presence_sharding()
        self._compute = jax.jit(
            self._run_compute,
            donate_argnames=("states", "presence_MV"),
            static_argnames="num_scored",
            out_shardings=(None, presence, None),
            **options,
        )
        of_slots = DecodeState((), replicated, replicated, presence, replicated)
        of_sample = (of_slots, None)
        self._sample_full = jax.jit(self._run_sample, donate_argnames="state", out_shardings=of_sample, **options)
        self._recurrent = [layer for layer, spec in enumerate(self.specs) if isinstance(spec, RecurrentSpec)]
        self._copy_slot = jax.jit(self._slot_copied, donate_argnums=1)
        self._add_known = jax.jit(self._known_added, donate_argnums=(0, 1), out_shardings=(presence, replicated))
        self._resize = jax.jit(self._resized, static_argnames="num_pages")
        self._grow_history = jax.jit(self._grown_history, static_argnames="length", out_shardings=replicated)

    def start(self, num_pages: tuple[int, ...]) -> DecodeState:
        """Return the state before the first step, with this many pages of each cache group in each shard."""
        zeros_M = np.zeros(self._num_slots, np.int32)
        last_tokens_M, finished_M = self._model.sharding_ctx.replicate((zeros_M, zeros_M > 0))
        return DecodeState(self._empty_states(num_pages), last_tokens_M, finished_M, self._empty_presence())

    def resize(self, state: DecodeState, num_pages: tuple[int, ...]) -> DecodeState:
        """Return the same state with this many pages of each cache group in each shard."""
        return state._replace(states=self._resize(state.states, num_pages=num_pages))

    def start_snapshots(self, num_snapshots: int) -> States:
        """Return room for copies of the recurrent layers' states, `num_snapshots` in each shard."""
        return self._empty_snapshots(num_snapshots)

    def save(self, state: DecodeState, snapshots: States, slot: int, snapshot: int) -> States:
        """Return the snapshots, which are donated, with one of the states in a slot; it is counted in the slot's shard."""
        states = tuple(state.states[layer] for layer in self._recurrent)
        return self._copy_slot(states, snapshots, *self._ends(slot, snapshot, snapshots))

    def restore(self, state: DecodeState, snapshots: States, slot: int, snapshot: int) -> DecodeState:
        """Return the state, which is donated, with a snapshot's states in a slot."""
        states = tuple(state.states[layer] for layer in self._recurrent)
        to_D, from_D = self._ends(slot, snapshot, snapshots)
        restored = dict(zip(self._recurrent, self._copy_slot(snapshots, states, from_D, to_D), strict=True))
        return state._replace(states=tuple(restored.get(layer, one) for layer, one in enumerate(state.states)))

    def _ends(self, slot: int, snapshot: int, snapshots: States) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of a slot and of a snapshot in its shard; those of the other shards are out of range."""
        num_snapshots = jax.tree.leaves(snapshots)[0].shape[1]
        shard = slot // (self._num_slots // self.num_shards)
        slots_D = np.full(self.num_shards, self._num_slots, np.int32)
        snapshots_D = np.full(self.num_shards, num_snapshots * self.num_shards, np.int32)
        slots_D[shard], snapshots_D[shard] = slot, shard * num_snapshots + snapshot
        return slots_D, snapshots_D

    def step(
        self,
        state: DecodeState,
        batch: Batch,
        sampling: SamplingBatch,
        *,
        num_top: int | None,
        known: Collection[tuple[int, list[int]]] = (),
        adapters_BR: np.ndarray | None = None,
    ) -> tuple[DecodeState, SampledTokens]:
        """Compute a step and sample the tokens that follow.

        Args:
          state: is donated.
          batch: from `BatchBuilder`.
          sampling: of each row's sequence.
          num_top: how many alternatives' log-probabilities to return; None for no log-probabilities at all.
          known: slots with the tokens before those that prefill computes, because their layers' states exist.
          adapters_BR: the factors of each row's adapter, in an engine with adapters.
        """
        state = self._prepare(state, sampling, known)
        used, unused = _used_tables(state, sampling)
        program = self._prefill if batch.is_prefill else self._decode
        step = StepArrays.of(batch, adapters_BR)
        state, sampled = program(self._model.parameters, used, step, sampling, num_top=num_top)
        return state._replace(**unused), sampled

    def mixed_step(
        self,
        state: DecodeState,
        batches: tuple[Batch, Batch],
        samplings: tuple[SamplingBatch, SamplingBatch],
        *,
        known: Collection[tuple[int, list[int]]] = (),
    ) -> tuple[DecodeState, tuple[SampledTokens, SampledTokens]]:
        """Compute chunks of prompts and one token of each decoding row as one program, which reads the weights once.

        Arguments are those of `step`, for both batches. No row may use processors of logits or an adapter.
        """
        state = self._prepare(state, samplings[0], known)
        used, unused = _used_tables(state, samplings[0])
        steps = StepArrays.of(batches[0]), StepArrays.of(batches[1])
        state, sampled = self._mixed(self._model.parameters, used, steps, samplings)
        return state._replace(**unused), sampled

    def compute(
        self,
        state: DecodeState,
        batch: Batch,
        sampling: SamplingBatch,
        *,
        num_scored: int | None = None,
        known: Collection[tuple[int, list[int]]] = (),
        adapters_BR: np.ndarray | None = None,
    ) -> tuple[DecodeState, StepLogits]:
        """Compute a step, of which decode has one token, and sample nothing.

        Arguments are those of `step`; `num_scored` is how many alternatives' log-probabilities to return for each token of
        the prompts, None for none at all.
        """
        state = self._prepare(state, sampling, known)
        presence_MV = state.token_presence_MV if batch.is_prefill else None
        slots, step = (state.last_tokens_M, state.finished_M), StepArrays.of(batch, adapters_BR)
        states, presence_MV, logits = self._compute(
            self._model.parameters, state.states, presence_MV, slots, step, num_scored=num_scored
        )
        state = state._replace(states=states)
        return (state if presence_MV is None else state._replace(token_presence_MV=presence_MV)), logits

    def sample(
        self,
        state: DecodeState,
        batch: Batch,
        logits: StepLogits,
        sampling: SamplingBatch,
        allowed_BW: np.ndarray,
        *,
        has_logprobs: bool,
    ) -> tuple[DecodeState, SampledTokens]:
        """Sample the tokens that follow a step.

        Args:
          state: from `compute`; is donated.
          batch: of the same step.
          logits: from `compute`.
          sampling: with processors.
          allowed_BW: a bit for each token, uint32, the lowest first: whether it may be sampled.
          has_logprobs: whether any row wants log-probabilities; there are those of `MAX_TOP_LOGPROBS` alternatives.
        """
        without = state._replace(states=())  # the layers' states have no part in it
        arguments = StepArrays.of(batch), logits._replace(scores=None), sampling, allowed_BW, np.array(has_logprobs)
        sampled_state, sampled = self._sample_full(without, *arguments)
        if not has_logprobs:
            sampled = sampled._replace(logprobs=None)
        return sampled_state._replace(states=state.states), sampled

    @contextlib.contextmanager
    def compiling(self, executor: Executor) -> Iterator[list[Future[Any]]]:
        """Compile the programs of steps in an executor's threads instead of running them.

        Yields what is being compiled. Inside the context `step`, `mixed_step` and `compute` return the state as it is, and
        shapes instead of arrays. After it, a call with like arguments uses the compiled program.
        """
        programs = {name: getattr(self, name) for name in ("_prefill", "_decode", "_mixed", "_compute")}
        futures: list[Future[Any]] = []

        def compile_only(program: Any, parameters: Any, state: Any, *arguments: Any, **static: Any) -> Any:
            lowered = program.lower(parameters, state, *arguments, **static)
            futures.append(executor.submit(lowered.compile))
            num_kept = 2 if program is programs["_compute"] else 1  # the first results are the new states
            return state, *arguments[: num_kept - 1], *lowered.out_info[num_kept:]

        try:
            for name, program in programs.items():
                setattr(self, name, functools.partial(compile_only, program))
            yield futures
        finally:
            for name, program in programs.items():
                setattr(self, name, program)

    def _prepare(
        self, state: DecodeState, sampling: SamplingBatch, known: Collection[tuple[int, list[int]]]
    ) -> DecodeState:
        """Return the state with room for the history that processors need, and with the known tokens of slots."""
        history_ML = state.history_ML
        if sampling.processors is not None:
            length = logits_processors.history_length(sampling.processors, np.asarray(sampling.end_B))
            if history_ML is None or history_ML.shape[1] < length:
                history_ML = self._grow_history(history_ML, length=length)
        presence_MV = state.token_presence_MV
        for slot, tokens in known:
            for start in range(0, len(tokens), KNOWN_AT_A_TIME):
                chunk = self._known_arrays(slot, tokens[start : start + KNOWN_AT_A_TIME], start)
                presence_MV, history_ML = self._add_known(presence_MV, history_ML, *chunk)
        return state._replace(token_presence_MV=presence_MV, history_ML=history_ML)

    def lower_prefill(
        self, num_pages: tuple[int, ...], num_rows: int, chunk_size: int, max_pages_of_row: tuple[int, ...]
    ) -> jax.stages.Lowered:
        """Lower the program of prefill, to be compiled but not run.

        The model's parameters may be abstract, and the devices of its mesh mere descriptions.

        Args:
          num_pages: of each cache group in each shard.
          num_rows, chunk_size: rows in all shards, and the tokens of each.
          max_pages_of_row: pages of each cache group that a row reads, at most.
        """
        entries = [num_rows // self.num_shards * most for most in max_pages_of_row]
        step = self._abstract_step(num_rows, chunk_size, 1, entries, is_prefill=True)
        state, sampling = self._abstract_state(num_pages), self._abstract_sampling(num_rows)
        return self._prefill.lower(self._model.parameters, state, step, sampling, num_top=None)

    def lower_decode(self, num_pages: tuple[int, ...]) -> jax.stages.Lowered:
        """Lower the program of decode for all slots; see `lower_prefill`."""
        step = self._abstract_step(self._num_slots, 1, 2, num_pages, is_prefill=False)
        state, sampling = self._abstract_state(num_pages), self._abstract_sampling(self._num_slots)
        return self._decode.lower(self._model.parameters, state, step, sampling, num_top=None)

    # --- abstract arguments ---

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._model.sharding_ctx.replicated())

    def _abstract_step(
        self, num_rows: int, num_tokens: int, num_written: int, entries: Any, *, is_prefill: bool
    ) -> StepArrays:
        def numbers(*shape: int) -> Any:
            return self._abstract(shape, np.int32)

        tokens, rows = numbers(num_rows, num_tokens), numbers(num_rows)
        columns = [numbers(self.num_shards, -(-number // MAX_ENTRIES) * MAX_ENTRIES) for number in entries]
        pages = tuple(PageIndices(numbers(num_rows, num_written), rows, x, x, x, numbers()) for x in columns)
        if not is_prefill:
            return StepArrays(None, tokens, None, numbers(), StepIndices(rows, pages))
        indices = StepIndices(rows, pages, numbers(num_rows, 1), self._abstract((num_rows,), np.bool_))
        return StepArrays(tokens, tokens, tokens, numbers(), indices)

    def _abstract_state(self, num_pages: tuple[int, ...]) -> DecodeState:
        """Return shapes and shardings of what `start` makes."""
        model = self._model

        def placed(what: str, x: Any, axes: tuple[str, ...]) -> Any:
            return x.update(sharding=model.sharding_ctx.activation(what, x.shape, axes))

        states = jax.eval_shape(
            lambda: empty_states(self.specs, self.num_shards, num_pages, self._num_slots // self.num_shards)
        )
        leaves, structure = jax.tree_util.tree_flatten(states)
        axes = [axes for spec in self.specs for axes in state_axes(spec)]
        states = jax.tree_util.tree_unflatten(
            structure, [placed("layer state", x, names) for x, names in zip(leaves, axes, strict=True)]
        )
        table = jax.ShapeDtypeStruct((self._num_slots, model.config.vocab_size), np.bool_)
        presence_MV = placed("token presence", table, token_presence.AXES)
        slots = (self._num_slots,)
        return DecodeState(states, self._abstract(slots, np.int32), self._abstract(slots, np.bool_), presence_MV)

    def _abstract_sampling(self, num_rows: int) -> SamplingBatch:
        sampling = SamplingTable(0).look_up(np.zeros(num_rows, np.int32), ())
        return jax.tree.map(lambda x: self._abstract(x.shape, x.dtype), sampling)

    # --- programs ---

    def _run_prefill(self, parameters, state, step, sampling, *, num_top):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx), adapter_factors(step.adapters_BR):
            module = with_parameters(self._model.module, parameters)
            state, logits = self._compute_prefill(module, state, step, None)
            if sampling.sampling is not None:
                state = self._with_presence(state, step)
            if sampling.processors is not None:
                state = self._with_history(state, step)
            state, tokens_B, logprobs = self._sample(state, logits, step.indices.slots_B, sampling, num_top)
            sampled = SampledTokens(tokens_B[None], jax.tree.map(lambda x: x[None], logprobs))
            return state, self._replicated(sampled)

    def _run_mixed(self, parameters, state, steps, samplings):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx):
            module = with_parameters(self._model.module, parameters)
            state, logits = self._compute_both(module, state, *steps)
            if samplings[0].sampling is not None:
                state = self._with_presence(state, steps[0])
            sampled = []
            for step, of_step, sampling in zip(steps, logits, samplings, strict=True):
                state, tokens_B, _ = self._sample(state, of_step, step.indices.slots_B, sampling, None)
                sampled.append(SampledTokens(tokens_B[None], None))
            return state, self._replicated(tuple(sampled))

    def _run_decode(self, parameters, state, step, sampling, *, num_top):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx), adapter_factors(step.adapters_BR):
            module = with_parameters(self._model.module, parameters)
            slots_B = step.indices.slots_B

            def decode(carry: tuple[jax.Array, DecodeState, SampledTokens]) -> tuple[jax.Array, DecodeState, SampledTokens]:
                index, state, sampled = carry
                state, logits = self._compute_decode(module, state, step, index)
                state, tokens_B, logprobs = self._sample(state, logits, slots_B, sampling, num_top)
                new = SampledTokens(tokens_B, logprobs)
                return index + 1, state, jax.tree.map(lambda all, one: all.at[index].set(one), sampled, new)

            def has_more(carry: tuple[jax.Array, DecodeState, SampledTokens]) -> jax.Array:
                index, state, _ = carry
                return (index < step.num_steps) & jnp.any(self._is_running(state, slots_B))

            start = (jnp.int32(0), state, self._nothing_sampled(len(slots_B), num_top))
            _, state, sampled = bounded_loop(has_more, decode, start, max_steps=self._max_steps)
            return state, self._replicated(sampled)

    def _run_compute(self, parameters, states, presence_MV, slots, step, *, num_scored):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx), adapter_factors(step.adapters_BR):
            module = with_parameters(self._model.module, parameters)
            state = DecodeState(states, slots[0], slots[1], presence_MV)
            if step.tokens_BT is None:
                state, logits = self._compute_decode(module, state, step, jnp.int32(0))
            else:
                state, logits = self._compute_prefill(module, state, step, num_scored)
                state = self._with_presence(state, step)
            logits_BV, *others = logits
            replicated = StepLogits(logits_BV, *self._replicated(others))
            return constrain_states(self.specs, state.states), state.token_presence_MV, replicated

    def _run_sample(self, state, step, logits, sampling, allowed_BW, has_logprobs):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx):
            if step.tokens_BT is not None:
                state = self._with_history(state, step)
            state, tokens_B, _ = self._sample(state, logits, step.indices.slots_B, sampling, None, allowed_BW)

            def logprobs_of_tokens() -> LogProbs:
                return log_probabilities(logits.logits_BV, tokens_B, MAX_TOP_LOGPROBS)

            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(logprobs_of_tokens))
            logprobs = jax.lax.cond(has_logprobs, logprobs_of_tokens, lambda: nothing)
            sampled = SampledTokens(tokens_B[None], jax.tree.map(lambda x: x[None], logprobs))
            return state, self._replicated(sampled)

    def _compute_prefill(self, module, state, step, num_scored):  # type: ignore[no-untyped-def]
        """Return the state and the `StepLogits` of chunks of prompts."""
        index_BX = step.indices.logit_indices_BX
        # A scored prompt needs all hidden states; otherwise the last layer leaves most of them out.
        indices = step.indices if num_scored is None else step.indices._replace(logit_indices_BX=None)
        x_BTD, states, _ = module(step.tokens_BT, step.positions_BT, state.states, indices)
        last_BXD = x_BTD if num_scored is None else take_positions(x_BTD, index_BX)
        logits_BV = module.unembed(last_BXD)[:, 0]
        next_B = take_positions(step.positions_BT, index_BX)[:, 0] + 1
        scores = None if num_scored is None else _scores(module, x_BTD, step.next_tokens_BT, num_scored)
        logits = StepLogits(logits_BV, last_BXD[:, 0], next_B, index_BX[:, 0] >= 0, scores)
        return state._replace(states=states), logits

    def _compute_decode(self, module, state, step, index):  # type: ignore[no-untyped-def]
        """Return the state and the `StepLogits` of the token number `index` of a dispatch."""
        rows, is_running_B = self._decoding_rows(state, step, index)
        x_B1D, states, _ = module(*rows[:2], state.states, rows.indices)
        logits = StepLogits(module.unembed(x_B1D)[:, 0], x_B1D[:, 0], rows.positions_BT[:, 0] + 1, is_running_B)
        return state._replace(states=states), logits

    def _decoding_rows(self, state, step, index):  # type: ignore[no-untyped-def]
        """Return the rows of a step that decodes, each with the token sampled last, and which of them still run."""
        slots_B = step.indices.slots_B
        is_running_B = self._is_running(state, slots_B)
        positions_B = jnp.where(is_running_B, step.positions_BT[:, 0] + index, -1)
        tokens_B1 = state.last_tokens_M[jnp.minimum(slots_B, self._num_slots - 1)][:, None]
        running = step.indices._replace(slots_B=jnp.where(is_running_B, slots_B, self._num_slots))
        return StepRows(tokens_B1, positions_B[:, None], running), is_running_B

    def _compute_both(self, module, state, prefill, decode):  # type: ignore[no-untyped-def]
        """Return the state, and the `StepLogits` of chunks of prompts and of one token of each decoding row."""
        rows, is_running_B = self._decoding_rows(state, decode, 0)
        index_B1 = jnp.zeros(rows.tokens_BT.shape, jnp.int32)
        rows = rows._replace(indices=rows.indices._replace(logit_indices_BX=index_B1))
        x_DXD, states, _ = module(prefill.tokens_BT, prefill.positions_BT, state.states, prefill.indices, decode=rows)
        num_chunks = len(prefill.tokens_BT) // self.num_shards
        logits_DXV = module.unembed(x_DXD)

        def of_group(where: slice, next_B: jax.Array, is_sampled_B: jax.Array) -> StepLogits:
            logits_BV, hidden_BD = (x[:, where].reshape(len(next_B), -1) for x in (logits_DXV, x_DXD))
            return StepLogits(logits_BV, hidden_BD, next_B, is_sampled_B)

        index_BX = prefill.indices.logit_indices_BX
        next_B = take_positions(prefill.positions_BT, index_BX)[:, 0] + 1
        of_chunks = of_group(slice(0, num_chunks), next_B, index_BX[:, 0] >= 0)
        of_decode = of_group(slice(num_chunks, None), rows.positions_BT[:, 0] + 1, is_running_B)
        return state._replace(states=states), (of_chunks, of_decode)

    def _is_running(self, state: DecodeState, slots_B: jax.Array) -> jax.Array:
        return (slots_B < self._num_slots) & ~state.finished_M[jnp.minimum(slots_B, self._num_slots - 1)]

    def _with_presence(self, state, step):  # type: ignore[no-untyped-def]
        """Add chunks of prompts to the table of tokens that slots have met."""
        chunks = step.indices.slots_B, step.tokens_BT, step.positions_BT
        return state._replace(token_presence_MV=token_presence.add_chunks(state.token_presence_MV, *chunks))

    def _with_history(self, state, step):  # type: ignore[no-untyped-def]
        """Add chunks of prompts to the history."""
        chunks = step.indices.slots_B, step.tokens_BT, step.positions_BT
        return state._replace(history_ML=logits_processors.add_chunks(state.history_ML, *chunks))

    def _nothing_sampled(self, num_rows: int, num_top: int | None) -> SampledTokens:
        """Return the arrays that the tokens of each step are put into."""
        tokens_SB = jnp.full((self._max_steps, num_rows), -1, jnp.int32)
        if num_top is None:
            return SampledTokens(tokens_SB, None)
        wide = jnp.promote_types(self._model.dtype, jnp.float32)
        tops = (self._max_steps, num_rows, num_top)
        return SampledTokens(tokens_SB, (jnp.zeros(tops[:2], wide), jnp.zeros(tops, jnp.int32), jnp.zeros(tops, wide)))

    def _sample(
        self,
        state: DecodeState,
        logits: StepLogits,
        slots_B: jax.Array,
        sampling: SamplingBatch,
        num_top: int | None,
        allowed_BW: jax.Array | None = None,
    ) -> tuple[DecodeState, jax.Array, LogProbs | None]:
        """Sample the next token of each row, of those allowed, and keep it in the slot of the row if it has one."""
        logits_BV, next_B, is_sampled_B = logits.logits_BV, logits.next_B, logits.is_sampled_B
        tokens_B = self._choose(state, logits_BV, slots_B, next_B, sampling, allowed_BW)
        logprobs = None if num_top is None else log_probabilities(logits_BV, tokens_B, num_top)
        is_finished_B = jnp.any(tokens_B[:, None] == sampling.stop_ids, axis=1) | (next_B >= sampling.end_B)
        to_B = jnp.where(is_sampled_B, slots_B, self._num_slots)
        last_tokens_M, finished_M = self._replicated(
            (
                state.last_tokens_M.at[to_B].set(tokens_B, mode="drop"),
                state.finished_M.at[to_B].set(is_finished_B, mode="drop"),
            )
        )
        presence_MV, history_ML = state.token_presence_MV, state.history_ML
        if presence_MV is not None:
            presence_MV = token_presence.add_tokens(presence_MV, to_B, tokens_B)
        if history_ML is not None:
            history_ML = self._replicated(logits_processors.add_tokens(history_ML, to_B, tokens_B, next_B))
        states = constrain_states(self.specs, state.states)
        state = DecodeState(states, last_tokens_M, finished_M, presence_MV, history_ML)
        return state, jnp.where(is_sampled_B, tokens_B, -1), logprobs

    def _choose(
        self,
        state: DecodeState,
        logits_BV: jax.Array,
        slots_B: jax.Array,
        next_B: jax.Array,
        sampling: SamplingBatch,
        allowed_BW: jax.Array | None,
    ) -> jax.Array:
        """Return the next token of each row, int32 [B].

        Rows that are all greedy, without penalties and biases, need one pass over the logits: they have a branch of their
        own, which takes nothing that would have to be written to memory before it.
        """
        params, processors = sampling.sampling, sampling.processors

        def greedy() -> jax.Array:
            if allowed_BW is None:
                return argmax(logits_BV)
            return allowed_argmax(logits_BV, allowed_BW)

        def drawn() -> jax.Array:
            assert params is not None
            processed_BV = self._process(state, logits_BV, slots_B, next_B, sampling)
            if allowed_BW is not None:
                processed_BV = restrict(processed_BV, unpack_allowed(allowed_BW, logits_BV.shape[1]))
            return sample(processed_BV, params, next_B)

        if params is None:
            assert processors is None
            return greedy()
        is_plain = jnp.all((params.temperature == 0) & (params.repetition_penalty == 1))
        if processors is not None:
            is_plain &= jnp.all(processors.prompt_length == 0)
        return jax.lax.cond(is_plain, greedy, drawn)

    def _process(
        self, state: DecodeState, logits_BV: jax.Array, slots_B: jax.Array, next_B: jax.Array, sampling: SamplingBatch
    ) -> jax.Array:
        """Return the logits after biases, bans and penalties."""
        processors, presence_MV = sampling.processors, state.token_presence_MV
        assert presence_MV is not None and sampling.sampling is not None
        if processors is None or state.history_ML is None:
            return apply_repetition_penalty(logits_BV, sampling.sampling, presence_MV, slots_B)
        history_BL = state.history_ML[jnp.minimum(slots_B, self._num_slots - 1)]
        stop_ids = jnp.asarray(sampling.stop_ids)
        logits_BV = logits_processors.apply_biases(logits_BV, processors, stop_ids, history_BL, next_B)
        logits_BV = apply_repetition_penalty(logits_BV, sampling.sampling, presence_MV, slots_B)
        return logits_processors.subtract_penalties(logits_BV, processors, history_BL, next_B)

    def _known_arrays(self, slot: int, tokens: list[int], start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens from position `start` on as a row of the slot's shard; the rows of other shards are padding."""
        slots_B = np.full(self.num_shards, self._num_slots, np.int32)
        tokens_BT, positions_BT = np.zeros((2, self.num_shards, KNOWN_AT_A_TIME), np.int32)
        positions_BT -= 1
        row = slot // (self._num_slots // self.num_shards)
        slots_B[row], tokens_BT[row, : len(tokens)] = slot, tokens
        positions_BT[row, : len(tokens)] = range(start, start + len(tokens))
        return slots_B, tokens_BT, positions_BT

    def _known_added(self, presence_MV, history_ML, slots_B, tokens_BT, positions_BT):  # type: ignore[no-untyped-def]
        """Add tokens of slots to what processors of logits read, as prefill does with those that it computes."""
        chunks = slots_B, tokens_BT, positions_BT
        with use_sharding(self._model.sharding_ctx):
            if history_ML is not None:
                history_ML = self._replicated(logits_processors.add_chunks(history_ML, *chunks))
            return token_presence.add_chunks(presence_MV, *chunks), history_ML

    def _grown_history(self, history_ML: jax.Array | None, *, length: int) -> jax.Array:
        """Return the history with room for `length` positions of each slot."""
        if history_ML is None:
            return self._replicated(jnp.zeros((self._num_slots, length), jnp.int32))
        return self._replicated(jnp.pad(history_ML, ((0, 0), (0, length - history_ML.shape[1]))))

    def _replicated(self, tree):  # type: ignore[no-untyped-def]
        return jax.lax.with_sharding_constraint(tree, self._model.sharding_ctx.replicated())

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _empty_states(self, num_pages: tuple[int, ...]) -> States:
        with use_sharding(self._model.sharding_ctx):
            states = empty_states(self.specs, self.num_shards, num_pages, self._num_slots // self.num_shards)
            return constrain_states(self.specs, states)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _empty_snapshots(self, num_snapshots: int) -> States:
        specs = [self.specs[layer] for layer in self._recurrent]
        with use_sharding(self._model.sharding_ctx):
            return constrain_states(specs, empty_states(specs, self.num_shards, (), num_snapshots))

    def _slot_copied(self, source, target, from_D, to_D):  # type: ignore[no-untyped-def]
        specs = [self.specs[layer] for layer in self._recurrent]
        with use_sharding(self._model.sharding_ctx):
            copied = jax.tree.map(lambda x, y: slots.copy(x, y, from_D, to_D), source, target)
            return constrain_states(specs, copied)

    def _presence_sharding(self) -> jax.sharding.NamedSharding:
        shape = self._num_slots, self._model.config.vocab_size
        return self._model.sharding_ctx.activation("token presence", shape, token_presence.AXES)

    def _empty_presence(self) -> jax.Array:
        """Return the table with its sharding as the programs write it: another spelling would compile one of them twice."""
        shape = self._num_slots, self._model.config.vocab_size
        with use_sharding(self._model.sharding_ctx):
            return jax.jit(lambda: token_presence.empty(*shape), out_shardings=self._presence_sharding())()

    def _resized(self, states: States, *, num_pages: tuple[int, ...]) -> States:
        with use_sharding(self._model.sharding_ctx):
            return constrain_states(self.specs, resized_states(self.specs, states, num_pages))


def _used_tables(state: DecodeState, sampling: SamplingBatch) -> tuple[DecodeState, dict[str, Any]]:
    """Return the state as a program takes it, without the tables that it does not use, and these by their field."""
    used, unused = state, dict[str, Any]()
    if sampling.sampling is None:
        used, unused["token_presence_MV"] = used._replace(token_presence_MV=None), state.token_presence_MV
    if sampling.processors is None:
        used, unused["history_ML"] = used._replace(history_ML=None), state.history_ML
    return used, unused


class SamplingTable:
    """How each slot samples, on the host: set when a sequence gets the slot, looked up for each step."""

    def __init__(self, num_slots: int):
        # One extra slot: padding.
        self._sampling = SamplingArrays.from_params([SamplingParams()] * (num_slots + 1))
        self._end_M = np.zeros(num_slots + 1, np.int32)
        self._num_top_M, self._num_scored_M = np.full(num_slots + 1, -1), np.full(num_slots + 1, -1)
        self._processors_M: list[ProcessorArrays | None] = [None] * (num_slots + 1)

    def set(self, slot: int, request: Request, end: int) -> None:
        params = request.params
        self._processors_M[slot] = ProcessorArrays.from_request(request)
        for column, value in zip(self._sampling, SamplingArrays.from_params([params]), strict=True):
            column[slot] = value[0]
        self._end_M[slot] = end
        self._num_top_M[slot] = -1 if params.logprobs is None else params.logprobs
        self._num_scored_M[slot] = -1 if params.prompt_logprobs is None else params.prompt_logprobs

    def needs_tokens(self, slot: int) -> bool:
        """Return whether the slot's logits depend on tokens of the prompt other than through the model."""
        return self._processors_M[slot] is not None or bool(self._sampling.repetition_penalty[slot] != 1)

    def has_processors(self, slots_B: np.ndarray) -> bool:
        return any(self._processors_M[slot] is not None for slot in slots_B.tolist())

    def are_greedy(self, slots_B: np.ndarray) -> bool:
        """Return whether each of these slots takes the token with the highest logit."""
        sampling = self._sampling
        return not np.any(sampling.temperature[slots_B]) and bool(np.all(sampling.repetition_penalty[slots_B] == 1))

    def look_up(self, slots_B: np.ndarray, stop_ids: Collection[int], *, with_processors: bool = False) -> SamplingBatch:
        """Return how these slots sample; `with_processors` also if no slot uses any."""
        padded = np.full(-(-max(len(stop_ids), 1) // NUM_STOP_IDS) * NUM_STOP_IDS, -1, np.int32)
        padded[: len(stop_ids)] = sorted(stop_ids)
        sampling = SamplingArrays(*(column[slots_B] for column in self._sampling))
        rows = [self._processors_M[slot] for slot in slots_B.tolist()]
        processors = logits_processors.of_rows(rows, always=with_processors)
        return SamplingBatch(sampling, self._end_M[slots_B], padded, processors)

    def num_top(self, slots_B: np.ndarray) -> int | None:
        """Return how many alternatives' log-probabilities these slots want; None for no log-probabilities at all.

        Each number is a program to compile, so it is one of a few.
        """
        return _one_of_few(self._num_top_M[slots_B])

    def num_scored(self, slots_B: np.ndarray, *, at_least: int = 0) -> int | None:
        """Return the same for the tokens of their prompts, `at_least` this many if any."""
        return _one_of_few(self._num_scored_M[slots_B], at_least)


def _one_of_few(wanted_B: np.ndarray, at_least: int = 0) -> int | None:
    wanted = int(wanted_B.max(initial=-1))
    return None if wanted < 0 else next(number for number in NUM_TOPS if number >= max(wanted, at_least))


def _scores(module: Transformer, x_BTD: jax.Array, next_tokens_BT: jax.Array, num_top: int) -> LogProbs:
    """Return `log_probabilities` of the tokens that follow; only a few tokens' logits exist at a time."""
    slices = [slice(start, start + SCORED_AT_A_TIME) for start in range(0, next_tokens_BT.shape[1], SCORED_AT_A_TIME)]
    scores = [log_probabilities(module.unembed(x_BTD[:, some]), next_tokens_BT[:, some], num_top) for some in slices]
    of_tokens, best, of_best = (jnp.concatenate(columns, axis=1) for columns in zip(*scores, strict=True))
    return of_tokens, best, of_best
