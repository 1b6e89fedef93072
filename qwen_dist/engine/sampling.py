"""Choosing the next token on the devices, each row by its own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.engine import seen
from qwen_dist.engine.request import SamplingParams

# Blocks of the vocabulary in which the most likely token is looked for, at most; published vocabularies divide by it.
MAX_BLOCKS = 128


class SamplingArrays(NamedTuple):
    """`SamplingParams` of every row, as arrays [B], so that no value of theirs means compiling again."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams]) -> SamplingArrays:
        """The rows' parameters, on the host."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(row, name) for row in params], dtype)

        # Both halves of a 64-bit seed count; jax without x64 has 32-bit integers.
        seed = np.array([row.seed % 2**64 for row in params], np.uint64)
        return cls(
            temperature=column("temperature", np.float32),
            top_k=np.array([min(row.top_k, 2**31 - 1) for row in params], np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            seed=np.stack([seed >> 32, seed & 0xFFFFFFFF], axis=1).astype(np.uint32),
        )


def penalise(logits_BV: jax.Array, params: SamplingArrays, seen_RV: jax.Array, rows_B: jax.Array) -> jax.Array:
    """The logits [B, V] after the repetition penalty.

    `seen_RV`: the table of `engine.seen`; `rows_B` is which of its rows these are.
    """

    def penalised() -> jax.Array:
        penalty_B1 = params.repetition_penalty[:, None].astype(logits_BV.dtype)
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        return jnp.where(seen.of_rows(seen_RV, rows_B), penalised_BV, logits_BV)

    return jax.lax.cond(jnp.any(params.repetition_penalty != 1), penalised, lambda: logits_BV)


def choose(logits_BV: jax.Array, params: SamplingArrays, positions_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float.
      params: of each row.
      positions_B: the position that the chosen token will have: with the seed it fixes the draw.
    """
    greedy_B = _most_likely(logits_BV)

    def draw() -> jax.Array:
        is_greedy_B = params.temperature == 0
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1, params.temperature)[:, None]
        drawn_B = _most_likely(_truncate(scaled_BV, params) + _gumbel(params.seed, positions_B, scaled_BV))
        return jnp.where(is_greedy_B, greedy_B, drawn_B)

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy_B)


def log_probabilities(logits: jax.Array, tokens: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of tokens [...] under logits [..., V], and the `num_top` best tokens and theirs [..., num_top]."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    of_tokens = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    of_best, best = jax.lax.top_k(log_probs, num_top)
    return of_tokens, best, of_best


def _most_likely(logits_BV: jax.Array) -> jax.Array:
    """`jnp.argmax` of each row: first which block of tokens has the highest logit, then which token of that block.

    XLA's CPU backend finds a maximum many times as fast as where it is, so that is only asked of a few numbers.
    """
    num_rows, vocab = logits_BV.shape
    num_blocks = math.gcd(vocab, MAX_BLOCKS)
    blocks_BXY = logits_BV.reshape(num_rows, num_blocks, -1)
    block_B = jnp.argmax(blocks_BXY.max(axis=2), axis=1)
    inside_B = jnp.argmax(jnp.take_along_axis(blocks_BXY, block_B[:, None, None], axis=1)[:, 0], axis=1)
    return (block_B * (vocab // num_blocks) + inside_B).astype(jnp.int32)


def _truncate(logits_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """Tokens outside top-k, top-p or min-p at -inf.

    A token goes where transformers' warpers would remove it; tokens tied with the last kept one are kept.
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
    """The lowest value [B, 1] that `holds` in each row, from its least to its highest logit; what is above holds too.

    The interval of floats between them is halved until one is left. A sort would give the same at several times the cost,
    and on TPUs takes longer to compile than the model's layers; it also needs all of a row on one device.
    """
    bits = jnp.iinfo(f"int{8 * logits_BV.dtype.itemsize}")

    def reorder(bits_B1: jax.Array) -> jax.Array:
        """A float's bits as an integer of the same order, and back: those of negative floats run the other way."""
        return jnp.where(bits_B1 < 0, bits_B1 ^ bits.max, bits_B1)

    def as_float(order_B1: jax.Array) -> jax.Array:
        return reorder(order_B1).view(logits_BV.dtype)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = interval
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # of the sum, which may be too large, the half
        is_enough_B1 = holds(as_float(middle_B1))
        return jnp.where(is_enough_B1, low_B1, middle_B1 + 1), jnp.where(is_enough_B1, middle_B1, high_B1)

    ends = (jnp.min(logits_BV, axis=-1, keepdims=True), jnp.max(logits_BV, axis=-1, keepdims=True))
    low_B1, high_B1 = (reorder(end_B1.view(bits.dtype)) for end_B1 in ends)
    return as_float(jax.lax.fori_loop(0, bits.bits, halve, (low_B1, high_B1))[1])


def _sum(x_BV: jax.Array) -> jax.Array:
    return jnp.sum(x_BV, axis=-1, keepdims=True)


def _gumbel(seed: jax.Array | np.ndarray, positions_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Noise whose maximum, added to logits, falls on each token with its probability; one stream a seed and position."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, like_BV.shape[1:], like_BV.dtype)

    return jax.vmap(row)(jnp.asarray(seed), positions_B)
