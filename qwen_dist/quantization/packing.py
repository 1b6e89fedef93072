"""The bits of packed weights: 32-bit words as checkpoints have them, and runs as `ops.grouped_weight` has them.

Values of `bits` bits lie in a word from its low bits up. AutoAWQ's are in another order within a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_dist.ops.grouped_weight import INT4_OFFSET, GroupedFormat

# The place of each of eight consecutive columns among the nibbles of an AutoAWQ word.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned values of 32-bit words [..., W] along the last dimension: uint8 [..., W · 32 / bits]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    assert bits == 4
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def in_awq_order(values: np.ndarray) -> np.ndarray:
    """Return the columns of unpacked AutoAWQ words [..., N] in their order."""
    return values.reshape(*values.shape[:-1], -1, 8)[..., AWQ_ORDER].reshape(values.shape)


def pack_runs(values: Any) -> Any:
    """Return runs of unsigned 4-bit values [..., R] as bytes [..., R / 2]: undo `ops.grouped_weight.unpack_runs`."""
    half = values.shape[-1] // 2
    return values[..., :half] | values[..., half:] << 4


def in_runs(values: Any, form: GroupedFormat) -> Any:
    """Return signed values [..., run] in int8 as the array `values` of a weight has them. Takes jax or NumPy arrays."""
    return pack_runs((values + np.int8(INT4_OFFSET)).view(np.uint8)) if form.encoding == "int4" else values
