"""Choosing the next token on the devices, each row by its own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.engine.request import SamplingParams


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

    `seen_RV`: bool; the tokens of prompt and answer so far of all rows; `rows_B` is which of them these are.
    """

    def penalised() -> jax.Array:
        penalty_B1 = params.repetition_penalty[:, None].astype(logits_BV.dtype)
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        return jnp.where(seen_RV.at[rows_B].get(mode="clip"), penalised_BV, logits_BV)

    return jax.lax.cond(jnp.any(params.repetition_penalty != 1), penalised, lambda: logits_BV)


def choose(logits_BV: jax.Array, params: SamplingArrays, positions_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float.
      params: of each row.
      positions_B: the position that the chosen token will have: with the seed it fixes the draw.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        is_greedy_B = params.temperature == 0
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1, params.temperature)[:, None]
        drawn_B = jnp.argmax(_truncate(scaled_BV, params) + _gumbel(params.seed, positions_B, scaled_BV), axis=-1)
        return jnp.where(is_greedy_B, greedy_B, drawn_B.astype(jnp.int32))

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda: greedy_B)


def log_probabilities(logits_BV: jax.Array, tokens_B: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the chosen tokens [B], and the `num_top` best tokens and theirs [B, num_top]."""
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=-1)[:, 0]
    top, tokens = jax.lax.top_k(log_probs_BV, num_top)
    return chosen_B, tokens, top


def _truncate(logits_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """Tokens outside top-k, top-p or min-p at -inf; one sort gives all three thresholds, exactly.

    A token goes where transformers' warpers would remove it; tokens tied with the last kept one are kept.
    """

    def threshold() -> jax.Array:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        last = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, sorted_BV.shape[-1]), sorted_BV.shape[-1]) - 1
        kth_B1 = jnp.take_along_axis(sorted_BV, last[:, None], axis=-1)
        within_k_BV = jnp.where(sorted_BV >= kth_B1, sorted_BV, -jnp.inf)
        probs_BV = jax.nn.softmax(within_k_BV, axis=-1)
        # A sum of rounded numbers can reach 1 before the last token, but a row without top-p keeps them all.
        more_probable_BV = jnp.where(params.top_p[:, None] < 1, jnp.cumsum(probs_BV, axis=-1) - probs_BV, 0)
        kept_BV = (within_k_BV > -jnp.inf) & (more_probable_BV < params.top_p[:, None])
        return jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)

    def everything() -> jax.Array:
        return jnp.full((logits_BV.shape[0], 1), -jnp.inf, logits_BV.dtype)

    needs_sort = jnp.any((params.top_k > 0) | (params.top_p < 1))
    lowest_B1 = jax.lax.cond(needs_sort, threshold, everything)
    min_p_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(params.min_p)[:, None].astype(logits_BV.dtype)
    return jnp.where(logits_BV >= jnp.maximum(lowest_B1, min_p_B1), logits_BV, -jnp.inf)


def _gumbel(seed: jax.Array | np.ndarray, positions_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """Noise whose maximum, added to logits, falls on each token with its probability; one stream a seed and position."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, like_BV.shape[1:], like_BV.dtype)

    return jax.vmap(row)(jnp.asarray(seed), positions_B)
