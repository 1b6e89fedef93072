"""A matrix product in which each group of rows has a weight of its own.

Rows are sorted by group and `sizes` says how many each group has: dynamic numbers in static shapes, so nothing is ever
dropped, however uneven they are. Rows behind the last group belong to none; what comes out for them means nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.models import native
from qwen_dist.models.layers import at_least_float32, weight_first
from qwen_dist.sharding import infers_on_cpus

# Rows multiplied at a time on a CPU, where a product takes as long for eight rows as for two; the small blocks are followed
# by how many rows a group may have on average.
LARGE_BLOCK, SMALL_BLOCKS = 64, {1: 0.25, 8: 4, 16: math.inf}
# The first rows of all groups can be one product, without a copy of any weight. It pays for wide floats, if groups have so
# many rows on average.
AT_ONCE, MEAN_FOR_AT_ONCE = 8, (2, 4)
# Rows, and elements in and out, of a tile of the kernel.
ROWS_OF_TILE, TILE, LANES = 128, 1024, 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(rows_RC: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Each row times the weight of its group: [R, O], accumulated in at least float32 and rounded once, to `dtype`.

    This is `jax.lax.ragged_dot`. The TPU's compiler copies all weights for it, so 16-bit floats get jax's kernel there,
    which reads them where they lie. XLA's CPU backend would compute each group for every row; inference gets this project's
    kernel there, and what that cannot do a loop over the groups that have rows.
    """
    return _rows_by_weights(rows_RC, weights_EOC, sizes_E, 2, dtype)


def _forward(rows_RC, weights_EOC, sizes_E, dtype):  # type: ignore[no-untyped-def]
    return grouped_product(rows_RC, weights_EOC, sizes_E, dtype), (rows_RC, weights_EOC, sizes_E)


def _backward(_dtype, operands, gradient_RO):  # type: ignore[no-untyped-def]
    rows_RC, weights_EOC, sizes_E = operands
    gradient_RO = gradient_RO.astype(rows_RC.dtype)
    of_rows = _rows_by_weights(gradient_RO, weights_EOC, sizes_E, 1, rows_RC.dtype)
    forms = {"cpu": _rows_by_rows_in_blocks, "default": _rows_by_rows_ragged}
    of_weights = jax.lax.platform_dependent(
        gradient_RO, rows_RC, sizes_E, **_on_tpu(forms, weights_EOC, rows_by_rows_in_tiles)
    )
    has_group_R1 = jnp.arange(len(rows_RC))[:, None] < sizes_E.sum()
    return jnp.where(has_group_R1, of_rows, 0), of_weights, np.zeros(sizes_E.shape, jax.dtypes.float0)


grouped_product.defvjp(_forward, _backward)


def _rows_by_weights(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, dim: int, dtype: DTypeLike) -> jax.Array:
    """Each row times its weight, summing over the weight's dimension `dim`."""
    if dim == 2 and infers_on_cpus() and native.can_multiply(x_RI, weights_EOC, dtype):
        return native.grouped_product(x_RI, weights_EOC, sizes_E, dtype)
    forms = {"cpu": _on_cpu, "default": _ragged}
    chosen = _on_tpu(forms, weights_EOC, rows_by_weights_in_tiles)
    given = {name: functools.partial(form, dim=dim, dtype=jnp.dtype(dtype)) for name, form in chosen.items()}
    return jax.lax.platform_dependent(x_RI, weights_EOC, sizes_E, **given)


def _on_tpu(forms: dict[str, Any], weights_EOC: jax.Array, in_tiles: Any) -> dict[str, Any]:
    """The kernel besides, for 16-bit floats (it would round wider ones) that fill its lanes (or they would be copied)."""
    _, num_out, num_in = weights_EOC.shape
    has_kernel = weights_EOC.dtype.itemsize == 2 and num_out % LANES == num_in % LANES == 0
    return forms | {"tpu": in_tiles} if has_kernel else forms


# --- TPU ---


def rows_by_weights_in_tiles(
    x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """Each row times its weight, summing over the weight's dimension `dim`; `interpret` runs where there is no TPU."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    num_out, num_in = weights_EOC.shape[3 - dim], x_RI.shape[1]
    x, tile = _in_tiles(x_RI)
    tiling = tile, min(num_in, TILE), min(num_out, TILE)
    options = {"transpose_rhs": dim == 2, "interpret": interpret}
    return gmm(x, weights_EOC, sizes_E, dtype, tiling, **options)[: len(x_RI)]


def rows_by_rows_in_tiles(
    left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The sum of the outer products of each group's rows, [E, O, C]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (left, tile), (right, _) = _in_tiles(left_RO), _in_tiles(right_RC)
    tiling = tile, min(left.shape[1], TILE), min(right.shape[1], TILE)
    return tgmm(left.T, right, sizes_E, left_RO.dtype, tiling, interpret=interpret)


def _in_tiles(x: jax.Array) -> tuple[jax.Array, int]:
    """Rows filled up to whole tiles, and how many a tile has. It is multiplied once for each group that it has a row of."""
    tile = min(ROWS_OF_TILE, -(-len(x) // 16) * 16)
    return jnp.pad(x, ((0, -len(x) % tile), (0, 0))), tile


# --- other accelerators ---


def _ragged(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (dim,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    wide = at_least_float32(x_RI.dtype)
    return jax.lax.ragged_dot_general(x_RI, weights_EOC, sizes_E, dims, preferred_element_type=wide).astype(dtype)


def _rows_by_rows_ragged(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    wide = at_least_float32(left_RO.dtype)
    product_EOC = jax.lax.ragged_dot_general(left_RO, right_RC, sizes_E, dims, preferred_element_type=wide)
    return product_EOC.astype(left_RO.dtype)


# --- CPU ---


def _on_cpu(x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, *, dim: int, dtype: jnp.dtype) -> jax.Array:
    """The first rows of all groups in one product, if that is faster, and the others in blocks."""
    num_rows, num_groups = len(x_RI), len(sizes_E)
    least, most = (mean * num_groups for mean in MEAN_FOR_AT_ONCE)
    if x_RI.dtype.itemsize < 4 or dim == 1 or not least <= num_rows <= most:
        return _in_blocks(x_RI, weights_EOC, sizes_E, dim=dim, dtype=dtype)
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def product() -> jax.Array:
        # What is behind the end of a group is another's, and not looked at.
        x_EXI = x_RI.at[starts_E[:, None] + jnp.arange(AT_ONCE)].get(mode="fill", fill_value=0)
        dims = ((2,), (2,)), ((0,), (0,))
        return jax.lax.dot_general(weights_EOC, x_EXI, dims, preferred_element_type=at_least_float32(x_EXI.dtype))

    # It reads the weights of groups without rows too, so these had better be few.
    pays = 2 * (sizes_E > 0).sum() > num_groups
    shape = (num_groups, weights_EOC.shape[1], AT_ONCE)
    first_EOX = jax.lax.cond(pays, product, lambda: jnp.zeros(shape, x_RI.dtype))
    group_R = jnp.repeat(jnp.arange(num_groups), sizes_E, total_repeat_length=num_rows)
    place_R = jnp.arange(num_rows) - starts_E[group_R]
    first_RO = first_EOX[group_R, :, jnp.minimum(place_R, AT_ONCE - 1)].astype(dtype)
    num_first = jnp.where(pays, AT_ONCE, 0)
    rest_RO = _in_blocks(x_RI, weights_EOC, sizes_E, num_first, dim=dim, dtype=dtype)
    return jnp.where(place_R[:, None] < num_first, first_RO, rest_RO)


def _in_blocks(
    x_RI: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, skipped: jax.Array | int = 0, *, dim: int, dtype: jnp.dtype
) -> jax.Array:
    """The groups that have rows one after the other, each without its first `skipped`: in large blocks of rows, and small
    ones for the few that are left.

    A group's last block reaches into the next group's rows, which then overwrite what it made of them.
    """
    small, num_out = _small_block(len(x_RI), len(sizes_E)), weights_EOC.shape[3 - dim]
    padded = _bits(jnp.pad(x_RI, ((0, LARGE_BLOCK), (0, 0))))
    starts_E = jnp.cumsum(sizes_E) - sizes_E + skipped
    sizes_E = jnp.maximum(sizes_E - skipped, 0)
    with_rows_first_E = jnp.argsort(sizes_E == 0, stable=True)

    def group(index: jax.Array, out: jax.Array) -> jax.Array:
        # The barrier ties the weights to this turn of the loop: XLA would widen or copy all of them in front of it.
        weights, index = jax.lax.optimization_barrier((weights_EOC, index))
        group = with_rows_first_E[index]
        weight_OC = jax.lax.dynamic_index_in_dim(_bits(weights), group, keepdims=False).view(weights.dtype)

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


def _by_weight(x_RI: jax.Array, weight_OC: jax.Array, dim: int) -> jax.Array:
    """A block of rows times one weight, in the form that is fastest on XLA's CPU backend."""
    wide = at_least_float32(x_RI.dtype)
    if len(x_RI) == 1:  # a matrix times a vector is fast in float32, even if the matrix has to be widened for it
        x = x_RI[0].astype(wide)
        weight = _widened(weight_OC).astype(wide)
        return (weight @ x if dim == 1 else x @ weight)[None]
    if dim == 0:
        return jax.lax.dot_general(x_RI, weight_OC, (((1,), (0,)), ((), ())), preferred_element_type=wide)
    if x_RI.dtype.itemsize == 2 and len(x_RI) < 32:
        return jax.lax.dot_general(x_RI, weight_OC, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return weight_first(x_RI, weight_OC)


def _rows_by_rows_in_blocks(left_RO: jax.Array, right_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The sum of the outer products of each group's rows, [E, O, C]: the gradient of the weights."""
    wide = at_least_float32(left_RO.dtype)
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
    """How many rows to multiply at a time, so that few groups need a second block and most blocks are nearly full."""
    return next(block for block, mean in SMALL_BLOCKS.items() if num_rows <= mean * num_groups)


def _bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: to slice those, XLA's CPU backend widens the whole array to float32."""
    return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x


def _widened(x: jax.Array) -> jax.Array:
    """bfloat16 as float32 by a shift of its bits, which compiles to less than a conversion; others as they are."""
    if x.dtype != jnp.bfloat16:
        return x
    return (x.view(jnp.uint16).astype(jnp.uint32) << 16).view(jnp.float32)
