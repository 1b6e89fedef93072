"""The products of `grouped_matmul` on a GPU: Pallas kernels for Triton.

XLA's own `ragged_dot` multiplies every row by every group's weight there. A tile is rows of one group; the last tile of a
group is filled up with nothing.

Letters: R rows, C in-features, O out-features, I the features that are summed over (C forward, O backward), E groups,
X tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.ops import gpu

# Rows of a tile: about as many as a group has, between what a tensor core multiplies and what the registers hold.
MIN_ROWS, MAX_ROWS = 16, 128
# Features that a program sums over at a time, and those that it makes; rows at a time in the gradient of the weights.
BLOCK_IN, BLOCK_OUT, BLOCK_ROWS = 64, 128, 32


def rows_by_weights_in_tiles(
    x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """Multiply each row by its weight, summing over the weight's dimension `dim`; `interpret` runs without a GPU."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_rows, num_groups, num_out = len(x_RI), len(weights_EOC), weights_EOC.shape[3 - dim]
    block = max(MIN_ROWS, min(MAX_ROWS, pl.next_power_of_2(pl.cdiv(num_rows, num_groups))))
    num_tiles = num_rows // block + min(num_groups, num_rows)  # each group may have one that is not full
    multiply = pl.pallas_call(
        functools.partial(_multiply_tile, block=block, dim=dim),
        grid=(pl.cdiv(num_out, BLOCK_OUT), num_tiles),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if block == MAX_ROWS else 4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul",
    )
    return multiply(x_RI, weights_EOC, *_tiles(sizes_E, block, num_tiles))


def can_tile_weights(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes these: it rounds wider floats."""
    return _can_multiply(x_RI, weights_EOC)


def rows_by_rows_in_tiles(
    left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return the sum of the outer products of each group's rows, [E, O, C]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    E, O, C = len(sizes_E), left_RO.shape[1], right_RC.shape[1]
    multiply = pl.pallas_call(
        _sum_outer_products,
        grid=(pl.cdiv(C, BLOCK_OUT), pl.cdiv(O, BLOCK_OUT), E),
        out_shape=jax.ShapeDtypeStruct((E, O, C), left_RO.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_outer_products",
    )
    end_E = jnp.cumsum(sizes_E)
    return multiply(left_RO, right_RC, end_E - sizes_E, end_E)


def can_tile_rows(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> bool:
    """As `can_tile_weights`, of the gradient of the weights."""
    return _can_multiply(left_RO, right_RC)


def _can_multiply(x: jax.Array, y: jax.Array) -> bool:
    return x.dtype == y.dtype and x.dtype.itemsize == 2 and len(x) > 0 and gpu.gpu_features().can_run_triton


def _tiles(sizes_E: jax.Array, block: int, num_tiles: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return for each tile its group, its first row, and the end of the group's rows; tiles too many have none."""
    ends_E, of_group_E = jnp.cumsum(sizes_E), -(-sizes_E // block)
    last_E = jnp.cumsum(of_group_E)
    number_X = jnp.arange(num_tiles)
    group_X = (number_X[:, None] >= last_E).sum(axis=1)
    is_tile_X, group_X = group_X < len(sizes_E), jnp.minimum(group_X, len(sizes_E) - 1)
    start_X = (ends_E - sizes_E)[group_X] + (number_X - (last_E - of_group_E)[group_X]) * block
    end_X = jnp.where(is_tile_X, ends_E[group_X], 0)
    return tuple(x.astype(jnp.int32) for x in (group_X, jnp.where(is_tile_X, start_X, 0), end_X))  # type: ignore[return-value]


def _multiply_tile(
    x_ref: Any, weights_ref: Any, group_ref: Any, start_ref: Any, end_ref: Any, out_ref: Any, *, block: int, dim: int
) -> None:
    """Multiply the rows of a tile by a block of the out-features of their group's weight."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    tile, num_in, num_out = pl.program_id(1), x_ref.shape[1], out_ref.shape[1]
    group, start, end = group_ref[tile], start_ref[tile], end_ref[tile]
    rows, is_row = pl.ds(start, block), start + jnp.arange(block) < end
    outs, is_out = _block(pl.program_id(0), BLOCK_OUT, num_out)

    def add(index: jax.Array, sums: jax.Array) -> jax.Array:
        ins, is_in = _block(index, BLOCK_IN, num_in)
        x = triton.load(x_ref.at[rows, ins], mask=is_row[:, None] & is_in[None, :], other=0.0)
        if dim == 2:
            weight = triton.load(weights_ref.at[group, outs, ins], mask=is_out[:, None] & is_in[None, :], other=0.0)
        else:
            weight = triton.load(weights_ref.at[group, ins, outs], mask=is_in[:, None] & is_out[None, :], other=0.0)
        return sums + _dot(x, weight, 1, dim - 1)

    @pl.when(start < end)
    def _() -> None:
        sums = jax.lax.fori_loop(0, pl.cdiv(num_in, BLOCK_IN), add, jnp.zeros((block, BLOCK_OUT), jnp.float32))
        triton.store(out_ref.at[rows, outs], sums.astype(out_ref.dtype), mask=is_row[:, None] & is_out[None, :])


def _sum_outer_products(left_ref: Any, right_ref: Any, start_ref: Any, end_ref: Any, out_ref: Any) -> None:
    """Sum a block of the outer products of the rows of a group."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    group = pl.program_id(2)
    start, end = start_ref[group], end_ref[group]
    outs, is_out = _block(pl.program_id(1), BLOCK_OUT, left_ref.shape[1])
    ins, is_in = _block(pl.program_id(0), BLOCK_OUT, right_ref.shape[1])

    def add(index: jax.Array, sums: jax.Array) -> jax.Array:
        first = start + index * BLOCK_ROWS
        rows, is_row = pl.ds(first, BLOCK_ROWS), first + jnp.arange(BLOCK_ROWS) < end
        left = triton.load(left_ref.at[rows, outs], mask=is_row[:, None] & is_out[None, :], other=0.0)
        right = triton.load(right_ref.at[rows, ins], mask=is_row[:, None] & is_in[None, :], other=0.0)
        return sums + _dot(left, right, 0, 0)

    num_blocks = jax.lax.div(end - start + BLOCK_ROWS - 1, BLOCK_ROWS)
    sums = jax.lax.fori_loop(0, num_blocks, add, jnp.zeros((BLOCK_OUT, BLOCK_OUT), jnp.float32))
    triton.store(out_ref.at[group, outs, ins], sums.astype(out_ref.dtype), mask=is_out[:, None] & is_in[None, :])


def _block(index: Any, size: int, most: int) -> tuple[Any, jax.Array]:
    """Return a block of this number and size, and which of its elements exist."""
    from jax.experimental import pallas as pl

    return pl.ds(index * size, size), index * size + jnp.arange(size) < most


def _dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((x_dim,), (y_dim,)), ((), ())), preferred_element_type=jnp.float32)
