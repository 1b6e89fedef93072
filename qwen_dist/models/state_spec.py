"""What each layer keeps between steps, as sizes. No jax.

A mixer makes the spec of its layer; engine, planner and parity tool read specs and never the layer's kind. The names are
vLLM's (`v1/kv_cache_interface.py`), where a recurrent state is `MambaSpec`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

CacheDtype = Literal["int8", "float8_e4m3fn"]


@dataclasses.dataclass(frozen=True)
class StateArray:
    """One array that a layer keeps, for one page or for one slot: `axes` are the logical names of its dimensions."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    initial: float = 0.0


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Keys and values in pages: of all positions of a sequence, or of the last `window` in a ring of pages.

    With `cache_dtype` they are kept in 8 bits with bfloat16 scales, `num_scales` for each position and head.
    """

    num_kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None
    cache_dtype: CacheDtype | None = None
    num_scales: int = 0

    def page_arrays(self, page_size: int) -> tuple[StateArray, ...]:
        shape, axes = (self.num_kv_heads, page_size, self.head_dim), ("kv_heads", "kv_length", "head_dim")
        if self.cache_dtype is None:
            return (StateArray(shape, self.dtype, axes),) * 2
        scale = StateArray((*shape[:2], self.num_scales), "bfloat16", (*axes[:2], "group"))
        return (StateArray(shape, self.cache_dtype, axes),) * 2 + (scale,) * 2


@dataclasses.dataclass(frozen=True)
class RecurrentSpec:
    """A state of fixed size for each slot, whatever the length of its sequence.

    The arrays have their initial value when a sequence starts at position 0, which also resets a slot that is reused.
    """

    slot_arrays: tuple[StateArray, ...]


LayerStateSpec = AttentionSpec | RecurrentSpec


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers that keep the same positions, so that one page table serves them all."""

    window: int | None
    layers: tuple[int, ...]


def cache_groups(specs: Sequence[LayerStateSpec]) -> tuple[CacheGroup, ...]:
    """Return the groups of paged layers, in the order of their first layers; recurrent layers need no pages."""
    layers: dict[int | None, list[int]] = {}
    for index, spec in enumerate(specs):
        if not isinstance(spec, RecurrentSpec):
            layers.setdefault(spec.window, []).append(index)
    return tuple(CacheGroup(window, tuple(indices)) for window, indices in layers.items())
