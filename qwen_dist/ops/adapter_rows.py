"""Which of several low-rank adapters each row of a batch uses.

Their matrices are stacked along the rank, so that a layer computes the low-rank products of all adapters for all rows,
which is little, and no row needs separate matrices. Between the two products the ranks of the other adapters become 0.

Letters: B rows, R ranks of all adapters.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import constrain

_factors: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("adapter_factors", default=None)


@contextlib.contextmanager
def adapter_factors(factors_BR: jax.Array | None) -> Iterator[None]:
    """Let `select_adapter` multiply by these factors in the block, at trace time; None leaves everything as it is."""
    token = _factors.set(None if factors_BR is None else constrain(factors_BR, "batch", "lora_rank"))
    try:
        yield
    finally:
        _factors.reset(token)


def select_adapter(x: jax.Array) -> jax.Array:
    """Return the output of the first low-rank matrices [B, ..., R], scaled for the row's adapter and 0 for the others."""
    factors_BR = _factors.get()
    if factors_BR is None:
        return x
    wide = accum_dtype(x.dtype)
    factors = factors_BR.reshape(len(factors_BR), *(1,) * (x.ndim - 2), -1)
    return (x.astype(wide) * factors.astype(wide)).astype(x.dtype)
