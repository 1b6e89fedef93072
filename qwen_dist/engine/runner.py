"""Every jitted function of inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine.request import SamplingParams
from qwen_dist.engine.sampling import SamplingArrays, choose, log_probabilities
from qwen_dist.models import cache as kv_cache
from qwen_dist.models.cache import Cache, LayerCache
from qwen_dist.sharding import bind, constrain, resolving


class State(NamedTuple):
    """What decoding carries from step to step, all of it on the devices and donated to each step.

    `tokens_B` were chosen last and stand at `positions_B`; their keys and values are not in the cache yet.
    """

    cache: Cache
    tokens_B: jax.Array
    positions_B: jax.Array
    seen_BV: jax.Array
    sampling: SamplingArrays


class Chosen(NamedTuple):
    """The tokens of one step [B] and, if asked for, `sampling.log_probabilities` of them."""

    tokens_B: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


class Runner:
    """The compiled programs for one model on one mesh: read a piece of the prompts, decode one token."""

    def __init__(self, model: LoadedModel):
        self._model = model
        static = ("num_live", "num_top")
        self._prefill = jax.jit(self._prefill_step, donate_argnames="state", static_argnames=static)
        self._decode = jax.jit(self._decode_step, donate_argnames="state", static_argnames=static)

    def start(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], num_slots: int) -> State:
        """The state before anything is read, with room for `num_slots` positions a row.

        The number of rows must be a multiple of the resolver's `batch_multiple`.
        """
        seen_BV = np.zeros((len(prompts), self._model.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            seen_BV[row, list(prompt)] = True
        zeros_B = np.zeros(len(prompts), np.int32)
        on_host = (zeros_B, zeros_B, seen_BV, SamplingArrays.from_params(params))
        tokens_B, positions_B, seen, sampling = self._model.resolver.replicate(on_host)
        return State(self._empty_cache(len(prompts), num_slots), tokens_B, positions_B, seen, sampling)

    def prefill(
        self,
        state: State,
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        last_B: np.ndarray,
        *,
        num_live: int,
        num_top: int | None,
    ) -> tuple[State, Chosen]:
        """Read a piece of each prompt and choose the next token of the rows whose prompt ends in it.

        Args:
          state: is used up.
          tokens_BT, positions_BT: int32, as for `Transformer`.
          last_B: int32, the index of a prompt's last token in this piece, -1 in rows whose prompt does not end here;
            what is chosen for those means nothing.
          num_live: slots of the cache to attend to.
          num_top: how many alternatives' log-probabilities to return; None for no log-probabilities at all.
        """
        return self._prefill(
            self._model.parameters, state, tokens_BT, positions_BT, last_B, num_live=num_live, num_top=num_top
        )

    def decode(self, state: State, *, num_live: int, num_top: int | None) -> tuple[State, Chosen]:
        """Choose one more token in every row; arguments as for `prefill`."""
        return self._decode(self._model.parameters, state, num_live=num_live, num_top=num_top)

    def lower(self, batch: int, num_slots: int, *, width: int | None, num_live: int) -> jax.stages.Lowered:
        """The program of `prefill` for pieces of `width` tokens, or with None that of `decode`, to be compiled but not run.

        The model's parameters may be abstract, and the devices of its mesh mere descriptions.
        """
        state, replicated = self._abstract_state(batch, num_slots), self._model.resolver.replicated()
        parameters, static = self._model.parameters, {"num_live": num_live, "num_top": None}
        if width is None:
            return self._decode.lower(parameters, state, **static)
        tokens_BT = jax.ShapeDtypeStruct((batch, width), np.int32, sharding=replicated)
        last_B = jax.ShapeDtypeStruct((batch,), np.int32, sharding=replicated)
        return self._prefill.lower(parameters, state, tokens_BT, tokens_BT, last_B, **static)

    def _abstract_state(self, batch: int, num_slots: int) -> State:
        """Shapes and shardings of what `start` makes."""
        model = self._model
        cache = jax.eval_shape(lambda: kv_cache.empty(model.config, batch, num_slots, model.dtype))
        sampling = jax.eval_shape(lambda: SamplingArrays.from_params([SamplingParams()] * batch))
        zeros_B = jax.ShapeDtypeStruct((batch,), np.int32)
        seen_BV = jax.ShapeDtypeStruct((batch, model.config.vocab_size), np.bool_)
        in_cache = model.resolver.activation("cache", cache[0].k.shape, kv_cache.CACHE_AXES)
        everywhere = model.resolver.replicated()
        small = jax.tree.map(lambda x: x.update(sharding=everywhere), (zeros_B, zeros_B, seen_BV, sampling))
        return State(jax.tree.map(lambda x: x.update(sharding=in_cache), cache), *small)

    def _prefill_step(self, parameters, state, tokens_BT, positions_BT, last_B, *, num_live, num_top):  # type: ignore[no-untyped-def]
        with resolving(self._model.resolver):
            module = bind(self._model.module, parameters)
            x_BTD, cache, _ = module(tokens_BT, positions_BT, state.cache, num_live)
            index_B11 = jnp.maximum(last_B, 0)[:, None, None]
            logits_BV = module.unembed(jnp.take_along_axis(x_BTD, index_B11, axis=1))[:, 0]
            next_B = jnp.take_along_axis(positions_BT, index_B11[:, :, 0], axis=1)[:, 0] + 1
            return self._advance(state._replace(cache=cache), logits_BV, next_B, last_B >= 0, num_top)

    def _decode_step(self, parameters, state, *, num_live, num_top):  # type: ignore[no-untyped-def]
        with resolving(self._model.resolver):
            module = bind(self._model.module, parameters)
            x_B1D, cache, _ = module(state.tokens_B[:, None], state.positions_B[:, None], state.cache, num_live)
            logits_BV = module.unembed(x_B1D)[:, 0]
            everyone_B = jnp.ones_like(state.tokens_B, bool)
            return self._advance(state._replace(cache=cache), logits_BV, state.positions_B + 1, everyone_B, num_top)

    def _advance(
        self, state: State, logits_BV: jax.Array, next_B: jax.Array, is_chosen_B: jax.Array, num_top: int | None
    ) -> tuple[State, Chosen]:
        """Choose a token for position `next_B` of each row, and move the rows `is_chosen_B` there."""
        tokens_B = choose(logits_BV, state.sampling, state.seen_BV, next_B)
        logprobs = None if num_top is None else log_probabilities(logits_BV, tokens_B, num_top)
        rows_B = jnp.arange(tokens_B.shape[0])
        state = State(
            cache=_constrain_cache(state.cache),
            tokens_B=jnp.where(is_chosen_B, tokens_B, state.tokens_B),
            positions_B=jnp.where(is_chosen_B, next_B, state.positions_B),
            seen_BV=state.seen_BV.at[rows_B, tokens_B].max(is_chosen_B),
            sampling=state.sampling,
        )
        replicated = self._model.resolver.replicated()
        small = (state._replace(cache=()), Chosen(tokens_B, logprobs))
        rest, chosen = jax.lax.with_sharding_constraint(small, replicated)
        return rest._replace(cache=state.cache), chosen

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def _empty_cache(self, batch: int, num_slots: int) -> Cache:
        with resolving(self._model.resolver):
            return _constrain_cache(kv_cache.empty(self._model.config, batch, num_slots, self._model.dtype))


def _constrain_cache(cache: Cache) -> Cache:
    return tuple(LayerCache(*(constrain(x, *kv_cache.CACHE_AXES) for x in layer)) for layer in cache)
