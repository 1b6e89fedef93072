"""Every jitted function of inference."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine import scheduler, seen
from qwen_dist.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from qwen_dist.engine.sampling import SamplingArrays, choose, log_probabilities, penalise
from qwen_dist.models import cache as kv_cache
from qwen_dist.models.cache import PAGE, VISITS, Cache, LayerCache, Pages
from qwen_dist.models.layers import take_positions
from qwen_dist.models.transformer import Transformer
from qwen_dist.sharding import constrain, use_sharding, with_parameters

NUM_STOP_IDS = 16
NUM_TOPS = (0, 5, MAX_TOP_LOGPROBS)
# Of each block of a prompt that is scored, so many tokens' logits are there at a time.
SCORED = 8


class DecodeState(NamedTuple):
    """What is carried from step to step, all of it on the devices and donated to each step; R rows.

    `tokens_R` were chosen last and stand at `positions_R`; their keys and values are not in the cache yet. Rows that
    `are_over` have met a stop token or their last position. `seen_RV` is the table of `engine.seen`.
    """

    cache: Cache
    tokens_R: jax.Array
    positions_R: jax.Array
    are_over_R: jax.Array
    seen_RV: jax.Array


class SamplingBatch(NamedTuple):
    """How B rows choose and when they end: `end_B` the last position a token may have, `stop_ids` padded with -1."""

    sampling: SamplingArrays
    end_B: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray


class Blocks(NamedTuple):
    """`scheduler.Piece`, as the devices need it."""

    tokens_BT: jax.Array | np.ndarray
    positions_BT: jax.Array | np.ndarray
    next_BT: jax.Array | np.ndarray
    rows_B: jax.Array | np.ndarray
    last_B: jax.Array | np.ndarray
    pages: tuple[Pages, ...]


class Rows(NamedTuple):
    """`scheduler.Steps`, as the devices need it, its `pages_BN` and visits for each kind of layers."""

    rows_B: jax.Array | np.ndarray
    first_B: jax.Array | np.ndarray
    num_steps: jax.Array | np.ndarray
    pages_BN: tuple[jax.Array | np.ndarray, ...]
    visits: tuple[tuple[jax.Array | np.ndarray, ...], ...]


LogProbs = tuple[jax.Array, jax.Array, jax.Array]


class SampledTokens(NamedTuple):
    """The tokens of each step [steps, B], -1 where there is none, and if asked for `log_probabilities` of them.

    `scores` are those of the tokens that follow each token of a piece [B, T], if asked for.
    """

    tokens_XB: jax.Array
    logprobs: LogProbs | None
    scores: LogProbs | None = None


class Runner:
    """The compiled programs for one model on one mesh: read a piece of the prompts, continue rows by some tokens."""

    def __init__(self, model: LoadedModel, num_rows: int, max_steps: int = 1):
        self._model, self._num_rows, self._max_steps = model, num_rows, max_steps
        self.parts = model.sharding_ctx.batch_multiple()
        self._read = jax.jit(self._read_piece, donate_argnames="state", static_argnames=("num_top", "num_scored"))
        self._continue = jax.jit(self._continue_rows, donate_argnames="state", static_argnames="num_top")
        self._resize = jax.jit(self._resized, static_argnames="num_pages")

    def start(self, num_pages: tuple[int, ...]) -> DecodeState:
        """The state before anything is read, with so many pages of each kind in each part of the mesh."""
        zeros_R = np.zeros(self._num_rows, np.int32)
        small: list[Any] = [*self._model.sharding_ctx.replicate((zeros_R, zeros_R, zeros_R > 0)), self._nothing_seen()]
        return DecodeState(self._empty_cache(num_pages), *small)

    def resize(self, state: DecodeState, num_pages: tuple[int, ...]) -> DecodeState:
        """The same state with so many pages of each kind in each part."""
        return state._replace(cache=self._resize(state.cache, num_pages=num_pages))

    def read(
        self,
        state: DecodeState,
        piece: scheduler.Piece,
        rules: SamplingBatch,
        *,
        num_top: int | None,
        num_scored: int | None = None,
    ) -> tuple[DecodeState, SampledTokens]:
        """Read a piece and choose the first token of the rows whose prompt ends in it.

        Args:
          state: is used up.
          piece: from the scheduler.
          rules: of each block's row.
          num_top: how many alternatives' log-probabilities to return; None for no log-probabilities at all.
          num_scored: the same for the tokens of the prompts.
        """
        is_kept_BT = piece.positions_BT >= 0
        pages = tuple(Pages(np.where(is_kept_BT, table.pages_BN, np.int32(-1)), *table.visits) for table in piece.tables)
        blocks = Blocks(piece.tokens_BT, piece.positions_BT, piece.next_BT, piece.rows_B, piece.last_B, pages)
        return self._read(self._model.parameters, state, blocks, rules, num_top=num_top, num_scored=num_scored)

    def step(
        self, state: DecodeState, steps: scheduler.Steps, rules: SamplingBatch, *, num_top: int | None
    ) -> tuple[DecodeState, SampledTokens]:
        """Choose up to `num_steps` more tokens in every row; arguments as for `read`."""
        pages = tuple(table.pages_BN for table in steps.tables)
        visits = tuple(tuple(table.visits) for table in steps.tables)
        rows = Rows(steps.rows_B, steps.first_B, np.array(steps.num_steps, np.int32), pages, visits)
        return self._continue(self._model.parameters, state, rows, rules, num_top=num_top)

    def lower_read(
        self, num_pages: tuple[int, ...], num_blocks: int, block: int, max_visits: tuple[int, ...]
    ) -> jax.stages.Lowered:
        """The program of `read`, to be compiled but not run: `num_blocks` in all, each looking at up to `max_visits` pages.

        Pages are counted for each kind of layers.

        The model's parameters may be abstract, and the devices of its mesh mere descriptions.
        """
        numbers: Any = functools.partial(
            jax.ShapeDtypeStruct, dtype=np.int32, sharding=self._model.sharding_ctx.replicated()
        )
        tokens, rows = numbers((num_blocks, block)), numbers((num_blocks,))
        visits = [numbers((self.parts, _padded(num_blocks // self.parts * most))) for most in max_visits]
        pages = tuple(Pages(tokens, of_kind, of_kind, of_kind, numbers(())) for of_kind in visits)
        blocks = Blocks(tokens, tokens, tokens, rows, rows, pages)
        state, rules = self._abstract_state(num_pages), self._abstract_rules(num_blocks)
        return self._read.lower(self._model.parameters, state, blocks, rules, num_top=None, num_scored=None)

    def lower_step(self, num_pages: tuple[int, ...]) -> jax.stages.Lowered:
        """The program of `step` for all rows; see `lower_read`."""
        numbers: Any = functools.partial(
            jax.ShapeDtypeStruct, dtype=np.int32, sharding=self._model.sharding_ctx.replicated()
        )
        ids, visits = numbers((self._num_rows,)), [numbers((self.parts, _padded(number))) for number in num_pages]
        pages = (numbers((self._num_rows, 2)),) * len(num_pages)
        rows = Rows(ids, ids, numbers(()), pages, tuple((of_kind,) * 3 + (numbers(()),) for of_kind in visits))
        state, rules = self._abstract_state(num_pages), self._abstract_rules(self._num_rows)
        return self._continue.lower(self._model.parameters, state, rows, rules, num_top=None)

    def _abstract_state(self, num_pages: tuple[int, ...]) -> DecodeState:
        """Shapes and shardings of what `start` makes."""
        model = self._model
        cache = jax.eval_shape(lambda: kv_cache.empty(model.config, self.parts, num_pages, model.dtype))
        placed = jax.tree.map(
            lambda x: x.update(sharding=model.sharding_ctx.activation("cache", x.shape, kv_cache.CACHE_AXES)), cache
        )
        rows, table = (self._num_rows,), (self._num_rows, model.config.vocab_size)
        one = functools.partial(jax.ShapeDtypeStruct, rows, sharding=model.sharding_ctx.replicated())
        seen_RV = jax.ShapeDtypeStruct(table, np.bool_, sharding=model.sharding_ctx.activation("seen", table, seen.AXES))
        small: list[Any] = [one(np.int32), one(np.int32), one(np.bool_), seen_RV]
        return DecodeState(placed, *small)

    def _abstract_rules(self, num_rows: int) -> SamplingBatch:
        rules = SamplingTable(0).look_up(np.zeros(num_rows, np.int32), ())
        everywhere = self._model.sharding_ctx.replicated()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), rules)

    def _read_piece(self, parameters, state, blocks, rules, *, num_top, num_scored):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx):
            module = with_parameters(self._model.module, parameters)
            only_B = blocks.last_B if num_scored is None else None
            x_BTD, cache, _ = module(blocks.tokens_BT, blocks.positions_BT, state.cache, blocks.pages, only_B=only_B)
            last_B1D = x_BTD if num_scored is None else take_positions(x_BTD, blocks.last_B)
            logits_BV = module.unembed(last_B1D)[:, 0]
            next_B = take_positions(blocks.positions_BT, blocks.last_B)[:, 0] + 1
            seen_RV = seen.read(state.seen_RV, blocks.rows_B, blocks.tokens_BT, blocks.positions_BT)
            state = state._replace(cache=cache, seen_RV=seen_RV)
            state, tokens_B, logprobs = self._choose(
                state, logits_BV, blocks.rows_B, next_B, blocks.last_B >= 0, rules, num_top
            )
            scores = None if num_scored is None else _scores(module, x_BTD, blocks.next_BT, num_scored)
            return state, self._replicated(SampledTokens(tokens_B[None], jax.tree.map(lambda x: x[None], logprobs), scores))

    def _continue_rows(self, parameters, state, rows, rules, *, num_top):  # type: ignore[no-untyped-def]
        with use_sharding(self._model.sharding_ctx):
            module = with_parameters(self._model.module, parameters)
            num_rows = len(rows.rows_B)
            inside_B = jnp.minimum(rows.rows_B, self._num_rows - 1)

            def is_running(state: DecodeState) -> jax.Array:
                return (rows.rows_B < self._num_rows) & ~state.are_over_R[inside_B]

            def step(carry: tuple[jax.Array, DecodeState, SampledTokens]) -> tuple[jax.Array, DecodeState, SampledTokens]:
                index, state, chosen = carry
                is_running_B = is_running(state)
                positions_B = jnp.where(is_running_B, state.positions_R[inside_B], -1)
                column_B1 = jnp.clip(positions_B // PAGE - rows.first_B, 0, 1)[:, None]
                pages = tuple(
                    Pages(jnp.where(is_running_B[:, None], jnp.take_along_axis(pages_BN, column_B1, axis=1), -1), *visits)
                    for pages_BN, visits in zip(rows.pages_BN, rows.visits, strict=True)
                )
                tokens_B1 = state.tokens_R[inside_B][:, None]
                x_B1D, cache, _ = module(tokens_B1, positions_B[:, None], state.cache, pages)
                logits_BV = module.unembed(x_B1D)[:, 0]
                state = state._replace(cache=cache)
                state, tokens_B, logprobs = self._choose(
                    state, logits_BV, rows.rows_B, positions_B + 1, is_running_B, rules, num_top
                )
                new = SampledTokens(tokens_B, logprobs)
                return index + 1, state, jax.tree.map(lambda all, one: all.at[index].set(one), chosen, new)

            def goes_on(carry: tuple[jax.Array, DecodeState, SampledTokens]) -> jax.Array:
                index, state, _ = carry
                return (index < rows.num_steps) & jnp.any(is_running(state))

            start = (jnp.int32(0), state, self._nothing(num_rows, num_top))
            # Not a loop where one step is all: XLA's CPU backend copies every weight for a loop, on each round.
            _, state, chosen = step(start) if self._max_steps == 1 else jax.lax.while_loop(goes_on, step, start)
            return state, self._replicated(chosen)

    def _nothing(self, num_rows: int, num_top: int | None) -> SampledTokens:
        """Room for what is chosen in each step."""
        tokens_XB = jnp.full((self._max_steps, num_rows), -1, jnp.int32)
        if num_top is None:
            return SampledTokens(tokens_XB, None)
        wide = jnp.promote_types(self._model.dtype, jnp.float32)
        more = (self._max_steps, num_rows, num_top)
        return SampledTokens(tokens_XB, (jnp.zeros(more[:2], wide), jnp.zeros(more, jnp.int32), jnp.zeros(more, wide)))

    def _choose(
        self,
        state: DecodeState,
        logits_BV: jax.Array,
        rows_B: jax.Array,
        next_B: jax.Array,
        is_chosen_B: jax.Array,
        rules: SamplingBatch,
        num_top: int | None,
    ) -> tuple[DecodeState, jax.Array, LogProbs | None]:
        """Choose a token for position `next_B` of each row, and move the rows `is_chosen_B` there."""
        likely_BV = penalise(logits_BV, rules.sampling, state.seen_RV, rows_B)
        tokens_B = choose(likely_BV, rules.sampling, next_B)
        logprobs = None if num_top is None else log_probabilities(logits_BV, tokens_B, num_top)
        is_over_B = jnp.any(tokens_B[:, None] == rules.stop_ids, axis=1) | (next_B >= rules.end_B)
        to_B = jnp.where(is_chosen_B, rows_B, self._num_rows)
        small = (
            state.tokens_R.at[to_B].set(tokens_B, mode="drop"),
            state.positions_R.at[to_B].set(next_B, mode="drop"),
            state.are_over_R.at[to_B].set(is_over_B, mode="drop"),
        )
        new: list[Any] = [*self._replicated(small), seen.add(state.seen_RV, to_B, tokens_B)]
        state = DecodeState(_constrain_cache(state.cache), *new)
        return state, jnp.where(is_chosen_B, tokens_B, -1), logprobs

    def _replicated(self, tree):  # type: ignore[no-untyped-def]
        return jax.lax.with_sharding_constraint(tree, self._model.sharding_ctx.replicated())

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _empty_cache(self, num_pages: tuple[int, ...]) -> Cache:
        with use_sharding(self._model.sharding_ctx):
            return _constrain_cache(kv_cache.empty(self._model.config, self.parts, num_pages, self._model.dtype))

    @functools.partial(jax.jit, static_argnums=0)
    def _nothing_seen(self) -> jax.Array:
        with use_sharding(self._model.sharding_ctx):
            return seen.empty(self._num_rows, self._model.config.vocab_size)

    def _resized(self, cache: Cache, *, num_pages: tuple[int, ...]) -> Cache:
        with use_sharding(self._model.sharding_ctx):
            return _constrain_cache(kv_cache.resized(self._model.config, cache, num_pages))


class SamplingTable:
    """The rules of all rows, on the host: set when a row is taken, looked up for each step."""

    def __init__(self, num_rows: int):
        # One more than there are rows: what stands in for a row that is none.
        self._sampling = SamplingArrays.from_params([SamplingParams()] * (num_rows + 1))
        self._end_R = np.zeros(num_rows + 1, np.int32)
        self._num_top_R, self._num_scored_R = np.full(num_rows + 1, -1), np.full(num_rows + 1, -1)

    def set(self, row: int, params: SamplingParams, end: int) -> None:
        for column, value in zip(self._sampling, SamplingArrays.from_params([params]), strict=True):
            column[row] = value[0]
        self._end_R[row] = end
        self._num_top_R[row] = -1 if params.logprobs is None else params.logprobs
        self._num_scored_R[row] = -1 if params.prompt_logprobs is None else params.prompt_logprobs

    def look_up(self, rows_B: np.ndarray, stop_ids: Collection[int]) -> SamplingBatch:
        """The rules of these rows."""
        padded = np.full(-(-max(len(stop_ids), 1) // NUM_STOP_IDS) * NUM_STOP_IDS, -1, np.int32)
        padded[: len(stop_ids)] = sorted(stop_ids)
        return SamplingBatch(SamplingArrays(*(column[rows_B] for column in self._sampling)), self._end_R[rows_B], padded)

    def num_top(self, rows_B: np.ndarray) -> int | None:
        """How many alternatives' log-probabilities these rows want; None for no log-probabilities at all.

        Each number is a program, so it is one of a few.
        """
        return _one_of_few(self._num_top_R[rows_B])

    def num_scored(self, rows_B: np.ndarray) -> int | None:
        """The same for the tokens of their prompts."""
        return _one_of_few(self._num_scored_R[rows_B])


def _one_of_few(wanted_B: np.ndarray) -> int | None:
    wanted = int(wanted_B.max(initial=-1))
    return None if wanted < 0 else next(number for number in NUM_TOPS if number >= wanted)


def _scores(module: Transformer, x_BTD: jax.Array, next_BT: jax.Array, num_top: int) -> LogProbs:
    """`log_probabilities` of the tokens that follow, a few of each row at a time: logits are wide."""
    T = next_BT.shape[1]
    pieces = [
        log_probabilities(module.unembed(x_BTD[:, start : start + SCORED]), next_BT[:, start : start + SCORED], num_top)
        for start in range(0, T, SCORED)
    ]
    of_tokens, best, of_best = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    return of_tokens, best, of_best


def _constrain_cache(cache: Cache) -> Cache:
    return tuple(LayerCache(*(constrain(x, *kv_cache.CACHE_AXES) for x in layer)) for layer in cache)


def _padded(num_visits: int) -> int:
    return -(-num_visits // VISITS) * VISITS
