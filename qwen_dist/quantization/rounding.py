"""Quantise weights on the host, group by group: symmetric, each value to the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qwen_dist.ops.grouped_weight import Encoding

# A scale is the group's value of the largest magnitude divided by one of these, whichever gives the least squared error.
# With 4 bits the sign counts: values are -8 to 7, so -8 can stand for the largest one only if the scale has the other sign.
# Divisors that clip more (-8.5, 7.5) have a smaller squared error, but a larger divergence of the model's answers.
DIVISORS: dict[Encoding, tuple[float, ...]] = {"int8": (127,), "int4": (-8, 7, 7.25), "float8_e4m3fn": (448,)}
LIMITS: dict[Encoding, tuple[float, float]] = {"int8": (-128, 127), "int4": (-8, 7), "float8_e4m3fn": (-448, 448)}


def quantize(values: np.ndarray, encoding: Encoding, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the quantised values and the scales of groups [..., g], with one scale for each: [..., g] and [..., 1].

    The values are int8 (also those of 4 bits) or float8. A scale is rounded to `scale_dtype` before values are divided by
    it.

    Raises:
      ValueError: a value is infinite or not a number.
    """
    wide = values.astype(np.float32)
    largest = np.take_along_axis(wide, np.abs(wide).argmax(axis=-1, keepdims=True), axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("it has values that are not finite")
    if encoding != "int4":
        largest = np.abs(largest)
    best, *others = (_with_divisor(wide, largest, divisor, encoding, scale_dtype) for divisor in DIVISORS[encoding])
    if others:
        least = _squared_error(wide, *best)
        for other in others:
            error = _squared_error(wide, *other)
            is_better = error < least
            least = np.where(is_better, error, least)
            best = np.where(is_better, other[0], best[0]), np.where(is_better, other[1], best[1])
    return best


def _with_divisor(
    wide: np.ndarray, largest: np.ndarray, divisor: float, encoding: Encoding, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    scale = (largest / np.float32(divisor)).astype(scale_dtype)
    # A group of zeros, or of numbers too small for the scale's dtype.
    scale = np.where(scale == 0, np.ones((), scale_dtype), scale)
    divided = wide / scale.astype(np.float32)
    low, high = LIMITS[encoding]
    if encoding == "float8_e4m3fn":
        return divided.clip(low, high).astype(ml_dtypes.float8_e4m3fn), scale
    return np.rint(divided, out=divided).clip(low, high, out=divided).astype(np.int8), scale


def _squared_error(wide: np.ndarray, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    error = values * scale.astype(np.float32)
    error -= wide
    return np.einsum("...g,...g->...", error, error)[..., None]
