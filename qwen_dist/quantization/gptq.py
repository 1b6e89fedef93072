"""GPTQ (arXiv:2210.17323): round a weight so that its outputs over a sample of inputs change little.

The columns of a weight are rounded one after the other. What rounding one adds to the outputs is subtracted by changing the
columns that are not rounded yet, in proportions that the inputs' second moments X^T X give. Columns with large inputs come
first, as in GPTQ's "act order"; the scales are those of the original groups, so the result needs no index of groups.

Letters: O out-features, C in-features, G groups of in-features, B columns of a block.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen_dist.ops.grouped_weight import GroupedFormat
from qwen_dist.quantization.packing import in_runs
from qwen_dist.quantization.rounding import LIMITS

# Columns that are rounded before the others are corrected by one matrix product.
BLOCK = 128
# A part of the mean second moment is added to each, so that inputs that never occur in the sample keep their weights.
DAMPING = 0.01


def round_with_feedback(weight_OC: jax.Array, moments_CC: jax.Array, scale_OG: jax.Array, form: GroupedFormat) -> jax.Array:
    """Return the array `values` [O, runs, run] of a weight in int8 or int4.

    Args:
      weight_OC: the weight.
      moments_CC: X^T X of the inputs [N, C] of a sample, float32.
      scale_OG: the scale of each group, which stays as it is.
      form: of the quantised weight.
    """
    weight, scale = weight_OC.astype(jnp.float32), scale_OG.astype(jnp.float32)
    order = jnp.argsort(-jnp.diagonal(moments_CC))
    scale_CO = jnp.repeat(scale, form.group_size, axis=1).T[order]
    feedback_CC = _feedback(moments_CC[order][:, order])
    rounded_CO = _round_columns(weight.T[order], scale_CO, feedback_CC, LIMITS[form.encoding])
    values_OC = jnp.zeros(rounded_CO.shape, jnp.int8).at[order].set(rounded_CO).T
    return in_runs(values_OC.reshape(len(weight), -1, form.run), form)


def _feedback(moments_CC: jax.Array) -> jax.Array:
    """Return the upper triangular U of H^-1 = U^T U, with H the damped moments.

    With the rows and columns of H in reverse, its Cholesky factor reversed again is an upper triangular M of H = M M^T, and
    U is M^-1.
    """
    size = len(moments_CC)
    damping = DAMPING * jnp.trace(moments_CC) / size
    damped = moments_CC + jnp.where(damping > 0, damping, 1.0) * jnp.eye(size, dtype=moments_CC.dtype)
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(size, dtype=upper.dtype), lower=False)


def _round_columns(
    weight_CO: jax.Array, scale_CO: jax.Array, feedback_CC: jax.Array, limits: tuple[float, float]
) -> jax.Array:
    """Return the quantised values [C, O] in int8, rounded row by row of `weight_CO`."""
    num_columns = len(weight_CO)
    size = math.gcd(num_columns, BLOCK)

    def round_block(weight_CO: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_BC = jax.lax.dynamic_slice_in_dim(feedback_CC, start, size)
        rows_BB = jax.lax.dynamic_slice_in_dim(rows_BC, start, size, axis=1)
        scale_BO = jax.lax.dynamic_slice_in_dim(scale_CO, start, size)

        def round_column(block_BO: jax.Array, column: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            scale_O, feedback_B = scale_BO[column], rows_BB[column]
            value_O = jnp.clip(jnp.rint(block_BO[column] / scale_O), *limits)
            error_O = (block_BO[column] - value_O * scale_O) / feedback_B[column]
            return block_BO - feedback_B[:, None] * error_O, (value_O.astype(jnp.int8), error_O)

        block_BO = jax.lax.dynamic_slice_in_dim(weight_CO, start, size)
        _, (values_BO, error_BO) = jax.lax.scan(round_column, block_BO, jnp.arange(size))
        # Rows of `feedback_CC` are zero before the diagonal, and the block's own columns are not used again.
        return weight_CO - rows_BC.T @ error_BO, values_BO

    starts = jnp.arange(0, num_columns, size)
    return jax.lax.scan(round_block, weight_CO, starts)[1].reshape(weight_CO.shape)
