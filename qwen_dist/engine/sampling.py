"""Sampling of the next token on the devices, each row by its own parameters.

Letters: B rows, M slots, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.engine import token_presence
from qwen_dist.engine.request import SamplingParams
from qwen_dist.ops.argmax import argmax


class SamplingArrays(NamedTuple):
    """`SamplingParams` of every row as arrays [B], so that another value compiles no new program."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams]) -> SamplingArrays:
        """Return the rows' parameters, on the host."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(row, name) for row in params], dtype)

        # A 64-bit seed in two halves: jax without x64 has 32-bit integers.
        seed = np.array([row.seed % 2**64 for row in params], np.uint64)
        return cls(
            temperature=column("temperature", np.float32),
            top_k=np.array([min(row.top_k, 2**31 - 1) for row in params], np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            seed=np.stack([seed >> 32, seed & 0xFFFFFFFF], axis=1).astype(np.uint32),
        )


def apply_repetition_penalty(
    logits_BV: jax.Array, params: SamplingArrays, token_presence_MV: jax.Array, slots_B: jax.Array
) -> jax.Array:
    """Return the logits [B, V] after the repetition penalty (arXiv:1909.05858).

    Args:
      logits_BV: of the rows.
      params: of the rows.
      token_presence_MV: the table of `engine.token_presence`.
      slots_B: the rows' slots in that table.
    """

    def penalized() -> jax.Array:
        penalty_B1 = params.repetition_penalty[:, None].astype(logits_BV.dtype)
        penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        return jnp.where(token_presence.of_slots(token_presence_MV, slots_B), penalized_BV, logits_BV)

    return jax.lax.cond(jnp.any(params.repetition_penalty != 1), penalized, lambda: logits_BV)


def restrict(logits_BV: jax.Array, allowed_BV: jax.Array) -> jax.Array:
    """Return the logits with -inf for tokens that are not allowed.

    Where biases and bans have left none of the allowed tokens, they do not count: an allowed token is sampled in any case.
    """
    is_left_BV = allowed_BV & (logits_BV > -jnp.inf)
    logits_BV = jnp.where(jnp.any(is_left_BV, axis=-1, keepdims=True), logits_BV, 0)
    return jnp.where(allowed_BV, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, params: SamplingArrays, positions_B: jax.Array) -> jax.Array:
    """Return the next token of each row, int32 [B].

    Args:
      logits_BV: float.
      params: of each row.
      positions_B: the position that the sampled token will have: with the seed it fixes the draw.
    """
    greedy_B = argmax(logits_BV)

    def draw() -> jax.Array:
        is_greedy_B = params.temperature == 0
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1, params.temperature)[:, None]
        drawn_B = argmax(_truncate(scaled_BV, params) + _gumbel(params.seed, positions_B, scaled_BV))
        return jnp.where(is_greedy_B, greedy_B, drawn_B)

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy_B)


def log_probabilities(logits: jax.Array, tokens: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probabilities of tokens [...] under logits [..., V], the `num_top` best tokens, and theirs."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    of_tokens = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    of_best, best = jax.lax.top_k(log_probs, num_top)
    return of_tokens, best, of_best


def _truncate(logits_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """Set the logits of tokens outside top-k, top-p or min-p to -inf.

    The same tokens as transformers' warpers remove; tokens tied with the last kept one are kept.
    """

    def threshold() -> jax.Array:
        top_k_B1 = jnp.where(params.top_k > 0, params.top_k, logits_BV.shape[-1])[:, None]
        kth_B1 = _lowest(logits_BV, lambda value_B1: _sum(logits_BV > value_B1) < top_k_B1)
        highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        masses_BV = jnp.where(logits_BV >= kth_B1, jnp.exp(logits_BV - highest_B1), 0)
        # A sum of rounded numbers can reach 1 before the last token, but a row without top-p keeps them all.
        top_p_B1 = jnp.where(params.top_p < 1, params.top_p, jnp.inf)[:, None].astype(logits_BV.dtype)
        limit_B1 = top_p_B1 * _sum(masses_BV)
        pth_B1 = _lowest(logits_BV, lambda value_B1: _sum(jnp.where(logits_BV > value_B1, masses_BV, 0)) < limit_B1)
        return jnp.maximum(kth_B1, pth_B1)

    def everything() -> jax.Array:
        return jnp.full((logits_BV.shape[0], 1), -jnp.inf, logits_BV.dtype)

    is_cut = jnp.any((params.top_k > 0) | (params.top_p < 1))
    lowest_B1 = jax.lax.cond(is_cut, threshold, everything)
    min_p_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(params.min_p)[:, None].astype(logits_BV.dtype)
    return jnp.where(logits_BV >= jnp.maximum(lowest_B1, min_p_B1), logits_BV, -jnp.inf)


def _lowest(logits_BV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the lowest value [B, 1] in the range of each row's logits for which `holds` is true; it is true above it too.

    Bisects the floats between the least and the highest logit. A sort would take several times as long to run and more to
    compile than the model's layers, and needs the whole row on one device.
    """
    bits = jnp.iinfo(f"int{8 * logits_BV.dtype.itemsize}")

    def reorder(bits_B1: jax.Array) -> jax.Array:
        """Turn a float's bits into an integer of the same order, and back: those of negative floats are reversed."""
        return jnp.where(bits_B1 < 0, bits_B1 ^ bits.max, bits_B1)

    def as_float(order_B1: jax.Array) -> jax.Array:
        return reorder(order_B1).view(logits_BV.dtype)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = interval
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # half of the sum, which itself may overflow
        is_enough_B1 = holds(as_float(middle_B1))
        return jnp.where(is_enough_B1, low_B1, middle_B1 + 1), jnp.where(is_enough_B1, middle_B1, high_B1)

    ends = (jnp.min(logits_BV, axis=-1, keepdims=True), jnp.max(logits_BV, axis=-1, keepdims=True))
    low_B1, high_B1 = (reorder(end_B1.view(bits.dtype)) for end_B1 in ends)
    return as_float(jax.lax.fori_loop(0, bits.bits, halve, (low_B1, high_B1))[1])


def _sum(x_BV: jax.Array) -> jax.Array:
    return jnp.sum(x_BV, axis=-1, keepdims=True)


def _gumbel(seed: jax.Array | np.ndarray, positions_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Return noise which, added to logits, makes each token the maximum with its probability; seed and position fix it."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, like_BV.shape[1:], like_BV.dtype)

    return jax.vmap(row)(jnp.asarray(seed), positions_B)
