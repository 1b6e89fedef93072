"""The short convolution of a gated delta net: over the last tokens, for each channel, with silu.

Letters: B rows, T tokens, G heads, C channels of a head, W taps: the token and those before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_dist.ops import native
from qwen_dist.ops.cost import Passes, Step
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype


def short_convolution(
    x_BTGC: jax.Array, before_BWGC: jax.Array, weight_GCW: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """Return silu(Σ_i w_i x_(t - W + 1 + i)) for each token, summed in at least float32 and rounded before the silu.

    Args:
      x_BTGC: the tokens.
      before_BWGC: the W - 1 tokens before them.
      weight_GCW: of each channel.
      segments_BT: the number of each token's sequence, where a row has several; none sees another. None: one.
    """
    return SHORT_CONVOLUTION(x_BTGC, before_BWGC, weight_GCW, segments_BT)


def short_convolution_plain(
    x_BTGC: jax.Array, before_BWGC: jax.Array, weight_GCW: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    T, wide = x_BTGC.shape[1], accum_dtype(x_BTGC.dtype)
    before = weight_GCW.shape[-1] - 1
    # Widened before it is shifted: then the gradient sums over the taps in float32.
    wide_BTGC = jnp.concatenate([before_BWGC, x_BTGC], axis=1).astype(wide)
    total_BTGC: Any = 0
    for tap_index in range(before + 1):
        shifted_BTGC = wide_BTGC[:, tap_index : tap_index + T]
        if segments_BT is not None:
            same_BT = jnp.roll(segments_BT, before - tap_index, axis=1) == segments_BT
            shifted_BTGC = jnp.where(same_BT[..., None, None], shifted_BTGC, 0)
        total_BTGC += shifted_BTGC * weight_GCW[..., tap_index].astype(wide)
    rounded_BTGC = total_BTGC.astype(x_BTGC.dtype).astype(wide)
    return jax.nn.silu(rounded_BTGC).astype(x_BTGC.dtype)


_KERNEL = Implementation("kernel", native.short_convolution, native.can_short_convolution)
SHORT_CONVOLUTION = Op("short convolution", short_convolution_plain, {Backend.CPU_KERNELS: (_KERNEL,)})


def short_convolution_flops(step: Step, num_heads: int, channels: int, num_taps: int) -> Passes:
    """Return a multiplication and an addition for each tap, and as many for each of its gradients."""
    flops = 2 * step.tokens(key_heads=num_heads) * channels * num_taps
    return Passes(flops, flops * (1 + step.trains_weights))
