"""The angles of rotary position embedding (arXiv:2104.09864) and its length extensions, as in `modeling_rope_utils.py`.

`ops.rotary` rotates by them. Letters: B batch, T length, A half of head_dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.models.config import RopeConfig
from qwen_dist.ops.matmul import accum_dtype


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Return the angle per position of each rotated pair, [A], computed on the host in `dtype`.

    In float32 every operation is rounded where PyTorch rounds it: at position 4,000 one unit in the last place of a
    frequency is already 2e-4 radians. (The power is taken in float64 and rounded, which equals PyTorch's float32 power to
    within its last bit.)
    """
    dtype = np.dtype(dtype).type
    exponents = np.arange(0, head_dim, 2, dtype=dtype) / dtype(head_dim)
    periods = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(dtype)
    plain = dtype(1) / periods
    if rope.type == "linear":
        return plain / dtype(rope.factor)
    if rope.type == "yarn":
        return _yarn(rope, head_dim, periods, dtype)
    if rope.type == "llama3":
        return _llama3(rope, plain, dtype)
    return plain


def rope_table(rope: RopeConfig, head_dim: int, positions_BT: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of every rotation angle, [B, T, A], in at least float32; `dtype` is the model's."""
    wide = accum_dtype(dtype)
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim, wide))
    if rope.type == "dynamic":
        frequencies = _dynamic(rope, head_dim, frequencies, positions_BT)
    angles = positions_BT[..., None].astype(wide) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def _yarn(rope: RopeConfig, head_dim: int, periods: np.ndarray, dtype: type) -> np.ndarray:
    """YaRN (arXiv:2309.00071): divide slow pairs by `factor`, keep fast ones, with a linear ramp between."""

    def pair_that_turns(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    assert rope.beta_fast is not None and rope.beta_slow is not None
    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=dtype) - dtype(low)) / dtype(high - low), 0, 1)
    kept = dtype(1) - ramp
    return dtype(1) / (dtype(rope.factor) * periods) * (dtype(1) - kept) + dtype(1) / periods * kept


def _llama3(rope: RopeConfig, plain: np.ndarray, dtype: type) -> np.ndarray:
    """Llama 3.1: like YaRN with a ramp in wavelengths instead of pairs."""
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    # PyTorch divides a number by a tensor as the tensor's reciprocal times the number, which rounds twice.
    wavelengths = dtype(1) / plain * dtype(2 * math.pi)
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    smooth = dtype(1) / wavelengths * dtype(rope.original_max_positions) - dtype(rope.low_freq_factor)
    smooth = smooth / dtype(rope.high_freq_factor - rope.low_freq_factor)
    slow = plain / dtype(rope.factor)
    between = (dtype(1) - smooth) * plain / dtype(rope.factor) + smooth * plain
    return np.where(wavelengths > longest, slow, np.where(wavelengths < shortest, plain, between)).astype(dtype)


def _dynamic(rope: RopeConfig, head_dim: int, plain: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Return NTK-aware frequencies for each sequence's own length, [B, 1, A].

    The base is multiplied by s^(d/(d-2)) with s = factor·length/trained - (factor - 1), so the frequency of pair i of d/2
    is multiplied by s^(-2i/(d-2)). PyTorch takes the longest sequence of the batch; here a row never depends on the others.
    """
    trained = rope.original_max_positions
    length = jnp.maximum(jnp.max(positions_BT, axis=1) + 1, trained).astype(plain.dtype)
    scale = rope.factor * length / trained - (rope.factor - 1)
    slower = jnp.arange(0, head_dim, 2, dtype=plain.dtype) / (head_dim - 2)
    return (plain * scale[:, None] ** -slower)[:, None, :]
