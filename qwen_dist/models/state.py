"""What each layer keeps between steps, as arrays.

A paged layer keeps pools of pages (`ops.paged_cache`); a recurrent layer keeps one state for each slot, a sequence's place
on the devices. `models.state_spec` has the sizes.

Letters: D data-parallel shards, B rows of a step, T tokens of a row, X tokens of a row whose logits are wanted, M slots of
a shard.
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
from qwen_dist.ops.paged_cache import PAGE, PagedState, stored_dtype
from qwen_dist.ops.step_rows import RowGroup, join_groups, slot_rows, split_groups
from qwen_dist.sharding import ShardingContext, constrain

# A pytree of arrays [D, …]: `PagedState`, or the tuple of a recurrent layer's arrays.
LayerState = Any
States = tuple[LayerState, ...]


class MixerInputs(NamedTuple):
    """What a mixer gets besides the tokens.

    Attributes:
      rope: cos and sin of the rotation angles, [B, T, head_dim / 2] each.
      positions_BT: each token's position; negative for padding.
      segments_BT: without a state: the sequence that each token belongs to, or None where a row has one.
      groups: with a state: the rows of the step. With more than one group, the tokens that a mixer gets are [D, tokens of a
        shard, …]: all rows of the first group, then those of the next. `split_groups` gives each group's rows.
      page_BT: with a cache: the page that each token is written to.
      logit_indices_BX: in the last layer: the tokens whose outputs are wanted.
    """

    rope: tuple[jax.Array, jax.Array]
    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    groups: tuple[RowGroup, ...] = ()
    page_BT: jax.Array | None = None
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


def update_slots(
    spec: RecurrentSpec, state: LayerState, inputs: MixerInputs, rows: Any, body: slots.Body
) -> tuple[Any, LayerState]:
    """Run a recurrence over the rows of a step; see `slots.recur`. Returns the outputs and the new state."""
    assert all(x.dtype == stored_dtype(x.dtype) for x in spec.slot_arrays), "a recurrence needs more than 16-bit floats"
    initial = tuple(x.initial for x in spec.slot_arrays)
    leaves, structure = jax.tree.flatten(rows)
    by_leaf = [split_groups(x, inputs.groups) for x in leaves]
    outputs = []
    for group, *of_group in zip(inputs.groups, *by_leaf, strict=True):
        rows_of_group = jax.tree.unflatten(structure, of_group)
        state, output = slots.recur(state, slot_rows(group), initial, rows_of_group, body)
        outputs.append(output)
    return jax.tree.map(lambda *x: join_groups(x, num_state_shards(state)), *outputs), state


def num_state_shards(state: LayerState) -> int:
    """Return over how many data-parallel shards a layer's state is distributed."""
    return jax.tree.leaves(state)[0].shape[0]
