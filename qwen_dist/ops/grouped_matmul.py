"""A matrix product in which each group of rows has its own weight, as the experts of a mixture do.

Rows are sorted by group and `sizes_E` says how many each group has: dynamic numbers in static shapes, so nothing is ever
dropped, however uneven the groups are. Rows after the last group belong to none; their results are undefined.

Letters: R rows, C in-features, O out-features, I the features that are summed over (C forward, O backward), E groups, X the
first rows of a group.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.ops import native, triton_grouped_matmul
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype, matmul_weight_major
from qwen_dist.ops.weight import QuantizedWeight, Weight

# Rows multiplied at a time on a CPU, where XLA's product of two rows takes as long as that of eight. SMALL_BLOCKS: the size
# of a small block → the most rows that a group may have on average for it.
LARGE_BLOCK, SMALL_BLOCKS = 64, {1: 0.25, 8: 4, 16: math.inf}
# The first FIRST_ROWS rows of all groups can be one batched product, without a copy of any weight. Measured: it pays in
# float32 if groups have MEAN_FOR_FIRST_ROWS rows on average (least, most).
FIRST_ROWS, MEAN_FOR_FIRST_ROWS = 8, (2, 4)
# The TPU kernels' tiles: rows, features in and out of a gradient, and the multiple that features must be of. A tile of a
# weight has all in-features, so that rows of one group that follow each other do not read it again. It has TILE_WEIGHT
# elements, which are 4 MB, and the kernel holds two of them, in 16 MB.
TILE_ROWS, TILE, LANES = 128, 1024, 128
TILE_WEIGHT, TILE_OUT = 2**21, 2048


def grouped_matmul(rows_RC: jax.Array, weights_EOC: Weight, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiply each row by the weight of its group, as `jax.lax.ragged_dot`.

    Args:
      rows_RC: floats, sorted by group.
      weights_EOC: of the same dtype, or quantised.
      sizes_E: int32, the number of rows of each group.
      dtype: what the result is rounded to, once.

    Returns:
      [R, O], summed in at least float32.
    """
    return GROUPED_MATMUL(rows_RC, weights_EOC, sizes_E, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _with_gradient(rows_RC: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return ROWS_BY_WEIGHTS(rows_RC, weights_EOC, sizes_E, dim=2, dtype=dtype)


def _forward(rows_RC, weights_EOC, sizes_E, dtype):  # type: ignore[no-untyped-def]
    return _with_gradient(rows_RC, weights_EOC, sizes_E, dtype), (rows_RC, weights_EOC, sizes_E)


def _backward(_dtype, operands, gradient_RO):  # type: ignore[no-untyped-def]
    rows_RC, weights_EOC, sizes_E = operands
    gradient_RO = gradient_RO.astype(rows_RC.dtype)
    by_rows = ROWS_BY_WEIGHTS(gradient_RO, weights_EOC, sizes_E, dim=1, dtype=rows_RC.dtype)
    by_weights = ROWS_BY_ROWS(gradient_RO, rows_RC, sizes_E)
    has_group_R1 = jnp.arange(len(rows_RC))[:, None] < sizes_E.sum()
    return jnp.where(has_group_R1, by_rows, 0), by_weights, np.zeros(sizes_E.shape, jax.dtypes.float0)


_with_gradient.defvjp(_forward, _backward)


def _plain(rows_RC: jax.Array, weights_EOC: Weight, sizes_E: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if isinstance(weights_EOC, jax.Array):
        return _with_gradient(rows_RC, weights_EOC, sizes_E, dtype)
    return _by_quantized_weights(rows_RC, weights_EOC, sizes_E, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_quantized_weights(
    rows_RC: jax.Array, weights_EOC: QuantizedWeight, sizes_E: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Multiply by quantised weights, which have no gradient."""
    return _in_blocks(rows_RC, weights_EOC, sizes_E, dim=2, dtype=dtype)


def _forward_by_quantized(rows_RC, weights_EOC, sizes_E, dtype):  # type: ignore[no-untyped-def]
    return _by_quantized_weights(rows_RC, weights_EOC, sizes_E, dtype), (weights_EOC, sizes_E)


def _backward_by_quantized(_dtype, operands, gradient_RO):  # type: ignore[no-untyped-def]
    weights_EOC, sizes_E = operands
    wanted = weights_EOC.dtype
    by_rows = _in_blocks(gradient_RO.astype(wanted), weights_EOC, sizes_E, dim=1, dtype=wanted)
    has_group_R1 = jnp.arange(len(gradient_RO))[:, None] < sizes_E.sum()
    return jnp.where(has_group_R1, by_rows, 0), None, None


_by_quantized_weights.defvjp(_forward_by_quantized, _backward_by_quantized)


# --- TPU ---


def rows_by_weights_in_tiles(
    x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """Multiply each row by its weight, summing over the weight's dimension `dim`; `interpret` runs without a TPU."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    num_out = weights_EOC.shape[3 - dim]
    x, tile = _in_tiles(x_RI)
    weights = _pad_to_lanes(weights_EOC, 1, 2)
    tiling = tile, x.shape[1], _num_tiled_out(x.shape[1], weights.shape[3 - dim])
    options = {"transpose_rhs": dim == 2, "interpret": interpret}
    return gmm(x, weights, sizes_E, dtype, tiling, **options)[: len(x_RI), :num_out]


def _num_tiled_out(num_in: int, num_out: int) -> int:
    """Return how many out-features of a weight are multiplied at once: whole lanes, and whole tiles if that is possible."""
    most = min(max(TILE_WEIGHT // num_in, LANES), TILE_OUT)
    return max((out for out in range(LANES, most + 1, LANES) if num_out % out == 0), default=LANES)


def can_tile_weights(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel pays: it rounds wider floats, and copies weights that do not fill its lanes.

    (The compiler copies all weights for `jax.lax.ragged_dot`, or multiplies all rows by every weight; the kernel reads
    weights in place.)
    """
    _, num_out, num_in = weights_EOC.shape
    return weights_EOC.dtype.itemsize == 2 and _can_fill_lanes(num_out, num_in)


def rows_by_rows_in_tiles(
    left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return the sum of the outer products of each group's rows, [E, O, C]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (left, tile), (right, _) = _in_tiles(left_RO), _in_tiles(right_RC)
    tiling = tile, min(left.shape[1], TILE), min(right.shape[1], TILE)
    product_EOC = tgmm(left.T, right, sizes_E, left_RO.dtype, tiling, interpret=interpret)
    return product_EOC[:, : left_RO.shape[1], : right_RC.shape[1]]


def can_tile_rows(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> bool:
    """As `can_tile_weights`, of the gradient of the weights."""
    return right_RC.dtype.itemsize == 2 and _can_fill_lanes(left_RO.shape[1], right_RC.shape[1])


def _can_fill_lanes(*sizes: int) -> bool:
    """Whether the sizes are whole lanes, or fewer than there are, as an adapter's rank: padding costs little there."""
    return all(size % LANES == 0 or size < LANES for size in sizes)


def num_padded_features(num_features: int) -> int:
    """Return how many features the TPU kernel multiplies for `num_features`."""
    return max(num_features, LANES)


def _pad_to_lanes(x: jax.Array, *dims: int) -> jax.Array:
    return jnp.pad(x, [(0, num_padded_features(n) - n if dim in dims else 0) for dim, n in enumerate(x.shape)])


def _in_tiles(x: jax.Array) -> tuple[jax.Array, int]:
    """Pad rows to whole tiles; also return the rows of a tile, which is multiplied once for each group with a row in it."""
    padded = jnp.pad(x, ((0, num_tiled_rows(len(x)) - len(x)), (0, 0)))
    return _pad_to_lanes(padded, 1), _tile_rows(len(x))


def num_tiled_rows(num_rows: int) -> int:
    """Return how many rows the TPU kernel multiplies for `num_rows`: whole tiles."""
    tile = _tile_rows(num_rows)
    return -(-num_rows // tile) * tile


def _tile_rows(num_rows: int) -> int:
    return min(TILE_ROWS, -(-num_rows // 16) * 16)


# --- the plain form ---


def _ragged(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (dim,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    wide = accum_dtype(x_RI.dtype)
    return jax.lax.ragged_dot_general(x_RI, weights_EOC, sizes_E, dims, preferred_element_type=wide).astype(dtype)


def _rows_by_rows_ragged(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    wide = accum_dtype(left_RO.dtype)
    product_EOC = jax.lax.ragged_dot_general(left_RO, right_RC, sizes_E, dims, preferred_element_type=wide)
    return product_EOC.astype(left_RO.dtype)


# --- CPU ---


def _on_cpu(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> jax.Array:
    """Multiply the first rows of all groups in one batched product, if that is faster, and the others in blocks."""
    num_rows, num_groups = len(x_RI), len(sizes_E)
    least, most = (mean * num_groups for mean in MEAN_FOR_FIRST_ROWS)
    if x_RI.dtype.itemsize < 4 or dim == 1 or not least <= num_rows <= most:
        return _in_blocks(x_RI, weights_EOC, sizes_E, dim=dim, dtype=dtype)
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def product() -> jax.Array:
        # Rows past the end of a group belong to the next; their results are not used.
        x_EXI = x_RI.at[starts_E[:, None] + jnp.arange(FIRST_ROWS)].get(mode="fill", fill_value=0)
        dims = ((2,), (2,)), ((0,), (0,))
        return jax.lax.dot_general(weights_EOC, x_EXI, dims, preferred_element_type=accum_dtype(x_EXI.dtype))

    # It also reads the weights of groups without rows, so it pays only if these are few.
    pays = 2 * (sizes_E > 0).sum() > num_groups
    shape = (num_groups, weights_EOC.shape[1], FIRST_ROWS)
    first_EOX = jax.lax.cond(pays, product, lambda: jnp.zeros(shape, x_RI.dtype))
    group_R = jnp.repeat(jnp.arange(num_groups), sizes_E, total_repeat_length=num_rows)
    place_R = jnp.arange(num_rows) - starts_E[group_R]
    first_RO = first_EOX[group_R, :, jnp.minimum(place_R, FIRST_ROWS - 1)].astype(dtype)
    num_first = jnp.where(pays, FIRST_ROWS, 0)
    rest_RO = _in_blocks(x_RI, weights_EOC, sizes_E, num_first, dim=dim, dtype=dtype)
    return jnp.where(place_R[:, None] < num_first, first_RO, rest_RO)


def _in_blocks(
    x_RI: jax.Array, weights_EOC: Weight, sizes_E: jax.Array, skipped: jax.Array | int = 0, *, dim: int, dtype: jnp.dtype
) -> jax.Array:
    """Multiply group after group, each without its first `skipped` rows: in large blocks, and small ones for the rest.

    A group's last block reaches into the rows of the next group, which then overwrites their results. Of quantised weights
    one at a time is an array, and those of groups without rows never are.
    """
    small, num_out = _small_block(len(x_RI), len(sizes_E)), weights_EOC.shape[3 - dim]
    padded = _bits(jnp.pad(x_RI, ((0, LARGE_BLOCK), (0, 0))))
    starts_E = jnp.cumsum(sizes_E) - sizes_E + skipped
    sizes_E = jnp.maximum(sizes_E - skipped, 0)
    with_rows_first_E = jnp.argsort(sizes_E == 0, stable=True)

    def group(index: jax.Array, out: jax.Array) -> jax.Array:
        # The barrier ties the weights to this iteration; without it XLA widens or copies all of them before the loop.
        weights, index = jax.lax.optimization_barrier((weights_EOC, index))
        group = with_rows_first_E[index]
        weight_OC = _weight_of_group(weights, group)

        def rows(block: int, first: jax.Array, index: jax.Array, out: jax.Array) -> jax.Array:
            start = first + index * block
            x = jax.lax.dynamic_slice_in_dim(padded, start, block).view(x_RI.dtype)
            y = _bits(_by_weight(x, weight_OC, dim - 1).astype(dtype))
            return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

        first, num_rows = starts_E[group], sizes_E[group]
        if len(x_RI) > LARGE_BLOCK // 2:
            num_large = (num_rows + LARGE_BLOCK // 2 - 1) // LARGE_BLOCK  # half a block or less is left
            out = jax.lax.fori_loop(0, num_large, functools.partial(rows, LARGE_BLOCK, first), out)
            first, num_rows = first + num_large * LARGE_BLOCK, num_rows - num_large * LARGE_BLOCK
        return jax.lax.fori_loop(0, -(-num_rows // small), functools.partial(rows, small, first), out)

    out = _bits(jnp.zeros((len(padded), num_out), dtype))
    return jax.lax.fori_loop(0, (sizes_E > 0).sum(), group, out).view(dtype)[: len(x_RI)]


def _weight_of_group(weights_EOC: Weight, group: jax.Array) -> jax.Array:
    if not isinstance(weights_EOC, jax.Array):
        return weights_EOC.take(group).dequantize()
    return jax.lax.dynamic_index_in_dim(_bits(weights_EOC), group, keepdims=False).view(weights_EOC.dtype)


def _by_weight(x_RI: jax.Array, weight_OC: jax.Array, dim: int) -> jax.Array:
    """Multiply a block of rows by one weight, in the form that is fastest on XLA CPU."""
    wide = accum_dtype(x_RI.dtype)
    if len(x_RI) == 1:  # matrix times vector is fast in float32, even if the matrix must be widened first
        x = x_RI[0].astype(wide)
        weight = _widened(weight_OC).astype(wide)
        return (weight @ x if dim == 1 else x @ weight)[None]
    if dim == 0:
        return jax.lax.dot_general(x_RI, weight_OC, (((1,), (0,)), ((), ())), preferred_element_type=wide)
    if x_RI.dtype.itemsize == 2 and len(x_RI) < 32:
        return jax.lax.dot_general(x_RI, weight_OC, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return matmul_weight_major(x_RI, weight_OC)


def _rows_by_rows_in_blocks(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Return the sum of the outer products of each group's rows, [E, O, C]: the gradient of the weights."""
    wide = accum_dtype(left_RO.dtype)
    block = min(64, max(2, 1 << (-(-len(left_RO) // len(sizes_E)) - 1).bit_length()))  # about as many as a group has
    left, right = (_bits(jnp.pad(x, ((0, block), (0, 0)))) for x in (left_RO, right_RC))
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    shape = (left_RO.shape[1], right_RC.shape[1])

    def group(index: jax.Array, out_EOC: jax.Array) -> jax.Array:
        def rows(number: jax.Array, sum_OC: jax.Array) -> jax.Array:
            start = starts_E[index] + number * block
            x, y = (jax.lax.dynamic_slice_in_dim(each, start, block).view(left_RO.dtype) for each in (left, right))
            is_of_group = number * block + jnp.arange(block)[:, None] < sizes_E[index]
            x = jnp.where(is_of_group, x, 0)
            return sum_OC + jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=wide)

        sum_OC = jax.lax.fori_loop(0, -(-sizes_E[index] // block), rows, jnp.zeros(shape, wide))
        return jax.lax.dynamic_update_index_in_dim(out_EOC, _bits(sum_OC.astype(left_RO.dtype)), index, 0)

    out_EOC = _bits(jnp.zeros((len(sizes_E), *shape), left_RO.dtype))
    return jax.lax.fori_loop(0, len(sizes_E), group, out_EOC).view(left_RO.dtype)


def _small_block(num_rows: int, num_groups: int) -> int:
    """Return a block size with which few groups need a second block and most blocks are nearly full."""
    return next(block for block, mean in SMALL_BLOCKS.items() if num_rows <= mean * num_groups)


def _bits(x: jax.Array) -> jax.Array:
    """View 16-bit floats as integers: to slice floats, XLA CPU widens the whole array to float32."""
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def _widened(x: jax.Array) -> jax.Array:
    """Widen bfloat16 to float32 by a shift of its bits, which is cheaper than a conversion; keep other types."""
    if x.dtype != jnp.bfloat16:
        return x
    return (x.view(jnp.uint16).astype(jnp.uint32) << 16).view(jnp.float32)


# --- which form runs where ---

_ON_CPU = (Backend.CPU_KERNELS, Backend.CPU_KERNELS_LOCAL, Backend.CPU)
_KERNELS = (
    Implementation("kernel", native.grouped_matmul, native.can_grouped_matmul),
    Implementation("quantised kernel", native.quantized_grouped_matmul, native.can_quantized_grouped_matmul),
)
GROUPED_MATMUL = Op("grouped_matmul", _plain, dict.fromkeys((Backend.CPU_KERNELS, Backend.CPU_KERNELS_LOCAL), _KERNELS))
# The plain form's own products: forward and by rows, and by weights.
ROWS_BY_WEIGHTS = Op(
    "grouped_matmul: rows x weights",
    _ragged,
    dict.fromkeys(_ON_CPU, (Implementation("blocks", _on_cpu),))
    | {
        Backend.GPU: (
            Implementation(
                "triton", triton_grouped_matmul.rows_by_weights_in_tiles, triton_grouped_matmul.can_tile_weights
            ),
        ),
        Backend.TPU: (Implementation("megablox", rows_by_weights_in_tiles, can_tile_weights),),
    },
)
ROWS_BY_ROWS = Op(
    "grouped_matmul: weight gradient",
    _rows_by_rows_ragged,
    dict.fromkeys(_ON_CPU, (Implementation("blocks", _rows_by_rows_in_blocks),))
    | {
        Backend.GPU: (
            Implementation("triton", triton_grouped_matmul.rows_by_rows_in_tiles, triton_grouped_matmul.can_tile_rows),
        ),
        Backend.TPU: (Implementation("megablox", rows_by_rows_in_tiles, can_tile_rows),),
    },
)
