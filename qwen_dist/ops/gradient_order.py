"""The order in which a backward pass computes gradients."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def has_adapters(block: Any) -> bool:
    """Return whether a block has low-rank adapters."""
    return any(map(_is_of_adapter, jax.tree_util.tree_leaves_with_path(block)))


def adapter_gradients_first(x: jax.Array, block: Tree) -> tuple[jax.Array, Tree]:
    """Return a block's input and the block as they are; the gradient of `x` waits for those of the block's adapters.

    Nothing else needs the adapters' gradients before the end. XLA computed them there, and kept what they are computed
    from: for each adapter the gradient of its layer's output, which is much larger than the gradients.
    """
    leaves, structure = jax.tree.flatten(block)
    places = [place for place, leaf in enumerate(jax.tree_util.tree_leaves_with_path(block)) if _is_of_adapter(leaf)]

    @jax.custom_vjp
    def unchanged(x: jax.Array, adapters: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        return x, adapters

    unchanged.defvjp(
        lambda x, adapters: ((x, adapters), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
    )
    x, adapters = unchanged(x, [leaves[place] for place in places])
    for place, adapter in zip(places, adapters, strict=True):
        leaves[place] = adapter
    return x, jax.tree.unflatten(structure, leaves)


def _is_of_adapter(leaf: tuple[Any, Any]) -> bool:
    return any(name in jax.tree_util.keystr(leaf[0]) for name in ("lora_A", "lora_B"))
