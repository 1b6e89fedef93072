"""The key/value cache: a plain pytree, one pair of arrays a layer, slot s of a row holding the row's position s."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_dist.models.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, [B, K, S, H] each, 16-bit floats as their bits.

    XLA's CPU backend widens a whole 16-bit float array to float32 and back to change a few elements of it; integers are
    changed in place, 1,000 times faster. Other backends do not mind.
    """

    k: jax.Array
    v: jax.Array


Cache = tuple[LayerCache, ...]
CACHE_AXES = ("batch", "kv_heads", "kv_length", "head_dim")


def empty(config: ModelConfig, batch: int, num_slots: int, dtype: DTypeLike) -> Cache:
    """A cache of zeros for `batch` rows of up to `num_slots` positions, for a model that computes in `dtype`."""
    shape = (batch, config.num_key_value_heads, num_slots, config.head_dim)
    zeros = jnp.zeros(shape, _stored_dtype(dtype))
    return tuple(LayerCache(zeros, zeros) for _ in config.layers)


def write(cache: LayerCache, k_BKTH: jax.Array, v_BKTH: jax.Array, start_B: jax.Array) -> LayerCache:
    """Put T consecutive positions into each row's slots from `start_B` on; a row that would not fit is left alone.

    A negative start marks a row without new tokens. Padding behind a row's last token is written too and does no harm:
    nobody sees a slot before its position has been reached, and then it has been written again.
    """
    num_slots = cache.k.shape[2]
    index_B1 = jnp.where(start_B < 0, num_slots, start_B)[:, None]
    return LayerCache(_write_rows(cache.k, k_BKTH, index_B1), _write_rows(cache.v, v_BKTH, index_B1))


def read(cache: LayerCache, num_live: int | None, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the first `num_live` slots (all when None); no row may have reached beyond."""
    return cache.k[:, :, :num_live].view(dtype), cache.v[:, :, :num_live].view(dtype)


def _stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def _write_rows(slots_BKSH: jax.Array, new_BKTH: jax.Array, index_B1: jax.Array) -> jax.Array:
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        slots_BKSH,
        index_B1,
        new_BKTH.view(slots_BKSH.dtype),
        dims,
        unique_indices=True,
        indices_are_sorted=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
