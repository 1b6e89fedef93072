"""Block-wise FP8 weights as Qwen publishes them: which scale belongs to which element, and how to multiply them.

A matrix [O, I] of float8 comes with `weight_scale_inv` [ceil(O / o), ceil(I / i)]; the block size (o, i) is in
`config.json`. The last block of a row or column may be partial, so the block of an element is computed from its index,
never from a ratio of shapes. The value is `float32(weight) * float32(scale)`, rounded once to the requested dtype, as in
transformers' `FineGrainedFP8`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen_dist.quantization.stored import read_stored

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})


def read_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block size (rows, columns) of an FP8 checkpoint; None for any other.

    Raises:
      CheckpointError: the quantisation is not supported.
    """
    stored = read_stored(config)
    scheme = None if stored is None or stored.method != "fp8" else stored.scheme_of("")
    return None if scheme is None else scheme.block


class BlockScales(NamedTuple):
    """Scales of a quantised box [row blocks, column blocks], and the block index of each row [R] and column [C]."""

    scale: np.ndarray
    row_blocks: np.ndarray
    column_blocks: np.ndarray


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor [..., O, I]."""
    *leading, rows, columns = shape
    return (*leading, math.ceil(rows / block[0]), math.ceil(columns / block[1]))


def dequantize(values: Any, scale: Any, row_blocks: Any, column_blocks: Any, dtype: np.dtype) -> Any:
    """Multiply float8 values by the scales of their blocks. Takes and returns numpy or jax arrays.

    Args:
      values: float8, any shape with R * C elements: an [R, C] matrix in row-major order.
      scale: [row blocks, column blocks].
      row_blocks, column_blocks: [R] and [C], the block index of each row and column.
      dtype: dtype of the result, which has the shape of `values`.
    """
    matrix = values.reshape(len(row_blocks), len(column_blocks)).astype(np.float32)
    factors = scale.astype(np.float32)[row_blocks][:, column_blocks]
    return (matrix * factors).astype(dtype).reshape(values.shape)
