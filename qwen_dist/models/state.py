"""What each layer keeps between steps, as arrays, and where the tokens of a step go in them.

A paged layer keeps pools of pages (`ops.paged_cache`); a recurrent layer keeps one state for each slot, a sequence's place
on the devices. `models.state_spec` has the sizes.

Letters: D data-parallel shards, B rows of a step, T tokens of a row, X tokens of a row whose logits are wanted, N pages
that a row writes to, M slots of a shard, E entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.models.state_spec import LayerStateSpec, RecurrentSpec, StateArray, cache_groups
from qwen_dist.ops import slots
from qwen_dist.ops.paged_cache import MAX_ENTRIES, NOWHERE, PAGE, PagedState, PageIndices, stored_dtype
from qwen_dist.sharding import ShardingContext, constrain

# A pytree of arrays [D, …]: `PagedState`, or the tuple of a recurrent layer's arrays.
LayerState = Any
Array = jax.Array | np.ndarray
States = tuple[LayerState, ...]


class StepIndices(NamedTuple):
    """Where the tokens of one step go in the layers' states; prefill, decode and the verification of drafts alike.

    Attributes:
      slots_B: the slot of each row, which is in the row's shard; the number of all slots where the row is padding.
      pages: for each cache group, the pages that rows write and read.
      logit_indices_BX: the tokens of each row whose hidden states are wanted; negative: none. None: all tokens of all rows.
      continues_B: whether a row continues the sequence of the row before it, where a sequence has several rows; these stand
        in order, because a recurrent layer must process them in order. None: no row does.
    """

    slots_B: Array
    pages: tuple[PageIndices, ...]
    logit_indices_BX: Array | None = None
    continues_B: Array | None = None


class MixerInputs(NamedTuple):
    """What a mixer gets besides the tokens; the fields after `segments_BT` are None without a state.

    Attributes:
      rope: cos and sin of the rotation angles, [B, T, head_dim / 2] each.
      positions_BT: each token's position; negative for padding.
      segments_BT: without a state: the sequence that each token belongs to, or None where a row has one.
      pages, page_BT: of the layer's cache group: what rows read, and the page that each token is written to.
      slots_B, continues_B: see `StepIndices`.
      logit_indices_BX: in the last layer: the tokens whose outputs are wanted.
    """

    rope: tuple[jax.Array, jax.Array]
    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    pages: PageIndices | None = None
    page_BT: jax.Array | None = None
    slots_B: jax.Array | None = None
    continues_B: jax.Array | None = None
    logit_indices_BX: jax.Array | None = None


def empty_states(specs: Sequence[LayerStateSpec], num_shards: int, num_pages: Sequence[int], num_slots: int) -> States:
    """Return the states before any token, with `num_pages` of each cache group and `num_slots` in each shard."""

    def layer(spec: LayerStateSpec, pages: int) -> LayerState:
        if isinstance(spec, RecurrentSpec):
            return tuple(jnp.full((num_shards, num_slots, *x.shape), _stored_initial(x)) for x in spec.slot_arrays)
        arrays = spec.page_arrays(PAGE)
        return PagedState(*(jnp.zeros((num_shards, pages, *x.shape), stored_dtype(x.dtype)) for x in arrays))

    return tuple(map(layer, specs, _pages_by_layer(specs, num_pages)))


def _stored_initial(array: StateArray) -> np.ndarray:
    return np.array(array.initial, jnp.dtype(array.dtype)).view(stored_dtype(array.dtype))


def resized_states(specs: Sequence[LayerStateSpec], states: States, num_pages: Sequence[int]) -> States:
    """Return the states with `num_pages` of each cache group in each shard; the new pages come after the old ones."""

    def layer(spec: LayerStateSpec, state: LayerState, pages: int) -> LayerState:
        if isinstance(spec, RecurrentSpec):
            return state
        widths = [(0, 0), (0, pages - state.k.shape[1]), (0, 0), (0, 0), (0, 0)]
        return jax.tree.map(lambda x: jnp.pad(x, widths), state)

    return tuple(map(layer, specs, states, _pages_by_layer(specs, num_pages)))


def _pages_by_layer(specs: Sequence[LayerStateSpec], num_pages: Sequence[int]) -> list[int]:
    by_layer = [0] * len(specs)
    for group, pages in zip(cache_groups(specs), num_pages, strict=True):
        for layer in group.layers:
            by_layer[layer] = pages
    return by_layer


def state_axes(spec: LayerStateSpec) -> tuple[tuple[str, ...], ...]:
    """Return the logical names of the dimensions of each array of a layer's state."""
    if isinstance(spec, RecurrentSpec):
        return tuple(("batch", "slots", *x.axes) for x in spec.slot_arrays)
    return tuple(("batch", "pages", *x.axes) for x in spec.page_arrays(PAGE))


def constrain_states(specs: Sequence[LayerStateSpec], states: States) -> States:
    """Shard the states as the active rules say."""

    def layer(spec: LayerStateSpec, state: LayerState) -> LayerState:
        arrays = [constrain(x, *axes) for x, axes in zip(jax.tree.leaves(state), state_axes(spec), strict=True)]
        return tuple(arrays) if isinstance(spec, RecurrentSpec) else PagedState(*arrays)

    return tuple(map(layer, specs, states))


def page_bytes(specs: Sequence[LayerStateSpec], sharding_ctx: ShardingContext) -> tuple[int, ...]:
    """Return the bytes on each device of one page of each cache group, in all layers of the group."""
    paged = [() if isinstance(spec, RecurrentSpec) else spec.page_arrays(PAGE) for spec in specs]
    return tuple(
        sum(_device_bytes(x, sharding_ctx, "pages") for layer in group.layers for x in paged[layer])
        for group in cache_groups(specs)
    )


def slot_bytes(specs: Sequence[LayerStateSpec], sharding_ctx: ShardingContext) -> int:
    """Return the bytes on each device of one slot, in all recurrent layers."""
    arrays = [x for spec in specs if isinstance(spec, RecurrentSpec) for x in spec.slot_arrays]
    return sum(_device_bytes(x, sharding_ctx, "slots") for x in arrays)


def _device_bytes(array: StateArray, sharding_ctx: ShardingContext, unit: str) -> int:
    shape = (sharding_ctx.batch_multiple(), 1, *array.shape)
    on_device = sharding_ctx.activation("layer state", shape, ("batch", unit, *array.axes)).shard_shape(shape)
    return math.prod(on_device) * jnp.dtype(array.dtype).itemsize


def page_of_tokens(pages: PageIndices, positions_BT: jax.Array) -> jax.Array:
    """Return the page that each token is written to, int32 [B, T]; negative for padding."""
    column_BT = jnp.clip(positions_BT // PAGE - pages.first_page_B[:, None], 0, pages.write_BN.shape[1] - 1)
    return jnp.where(positions_BT < 0, -1, jnp.take_along_axis(jnp.asarray(pages.write_BN), column_BT, axis=1))


def indices_in_order(
    specs: Sequence[LayerStateSpec], positions_BT: jax.Array, num_shards: int, pages_per_row: int
) -> StepIndices:
    """Return the plainest allocation: row b has slot b and `pages_per_row` consecutive pages of every cache group."""
    num_rows, rows = len(positions_BT), len(positions_BT) // num_shards
    write_BN = (jnp.arange(num_rows) % rows)[:, None] * pages_per_row + jnp.arange(pages_per_row)
    num_entries = rows * pages_per_row
    missing = -num_entries % MAX_ENTRIES
    page_E = jnp.pad(jnp.arange(num_entries), (0, missing))
    start_E = jnp.pad(page_E[:num_entries] % pages_per_row * PAGE, (0, missing), constant_values=NOWHERE)
    row_DE, page_DE, start_DE = (jnp.tile(x, (num_shards, 1)) for x in (page_E // pages_per_row, page_E, start_E))
    pages = PageIndices(write_BN, jnp.zeros(num_rows, jnp.int32), row_DE, page_DE, start_DE, jnp.int32(num_entries))
    return StepIndices(jnp.arange(num_rows), (pages,) * len(cache_groups(specs)))


def slot_rows(inputs: MixerInputs) -> slots.SlotRows:
    """Return where the rows of a step have their slots; a row whose first position is 0 starts a sequence."""
    assert inputs.slots_B is not None
    return slots.SlotRows(inputs.slots_B, inputs.positions_BT[:, 0] == 0, inputs.continues_B)


def update_slots(
    spec: RecurrentSpec, state: LayerState, inputs: MixerInputs, rows: Any, body: slots.Body
) -> tuple[Any, LayerState]:
    """Run a recurrence over the rows of a step; see `slots.recur`. Returns the outputs [B, …] and the new state."""
    assert all(x.dtype == stored_dtype(x.dtype) for x in spec.slot_arrays), "a recurrence needs more than 16-bit floats"
    initial = tuple(x.initial for x in spec.slot_arrays)
    state, outputs = slots.recur(state, slot_rows(inputs), initial, rows, body)
    return outputs, state
