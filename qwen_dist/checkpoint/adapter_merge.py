"""Merge an adapter into the weights: each kind of change is a function W' = f(W, tensors), in `KINDS`.

Letters: E experts, O outputs, I inputs, R rank. All functions see the weight in the shape of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.adapter_config import raise_problems
from qwen_dist.checkpoint.names import EMBEDDING, HEAD
from qwen_dist.models.parameters import DiskShape, from_disk, on_disk
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import ShardingContext

Shapes = Mapping[str, DiskShape]


@dataclasses.dataclass(frozen=True)
class Update:
    """One change of one parameter.

    Attributes:
      layer: the layer as the adapter names it, for messages, without the checkpoint's prefix.
      parameter: the name of the parameter that changes.
      kind: one of `KINDS`.
      tensors: what `KINDS` needs of the adapter.
      rank: of the matrices; 0 if there are none.
      is_base: a copy of the base weights that PEFT stores with an adapter of an embedding.
      names_experts: the experts were named one by one, so the last ones may have no adapter.
    """

    layer: str
    parameter: str
    kind: str
    tensors: Mapping[str, np.ndarray]
    rank: int = 0
    is_base: bool = False
    names_experts: bool = False

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the weight that this changes; `shape` is that of the model, for what the kind leaves open."""
        tensors = self.tensors
        if self.kind == "rows":
            return (*shape[:1], *tensors["value"].shape[1:])
        if "a" not in tensors:
            return tensors["value"].shape
        return (*tensors["b"].shape[:-1], tensors["a"].shape[-1])


def _wide(weight: jax.Array) -> jax.Array:
    return weight.astype(accum_dtype(weight.dtype))


def _lora(weight: jax.Array, update: Mapping[str, jax.Array], rank: int) -> jax.Array:
    """Return W + scale · B A, with A [E, R, I] and B [E, O, R], or without E (arXiv:2106.09685)."""
    wide = accum_dtype(weight.dtype)
    product = jnp.matmul(update["b"].astype(wide), update["a"].astype(wide), precision="highest")
    return weight.astype(wide) + update["scale"].astype(wide) * product


def _dora(weight: jax.Array, update: Mapping[str, jax.Array], rank: int, *, axis: int = -1) -> jax.Array:
    """Scale each row of the sum of `_lora` to its norm in `magnitude` (arXiv:2402.09353). NaN: the row has none."""
    merged = _lora(weight, update, rank)
    norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=axis, keepdims=True))
    magnitude = jnp.expand_dims(update["magnitude"].astype(merged.dtype), axis)
    return jnp.where(jnp.isnan(magnitude), 1, magnitude / norm) * merged


def _pissa(weight: jax.Array, update: Mapping[str, jax.Array], rank: int) -> jax.Array:
    """Return W without its R largest singular values (arXiv:2404.02948), as PEFT does when it loads such an adapter."""
    left, values, right = jnp.linalg.svd(_wide(weight), full_matrices=False)
    return _wide(weight) - jnp.matmul(left[:, :rank] * values[:rank], right[:rank], precision="highest")


def _olora(weight: jax.Array, update: Mapping[str, jax.Array], rank: int) -> jax.Array:
    """Return W without the first R columns of Q times the first R rows of R, where W = Q R (arXiv:2406.01775)."""
    q, r = jnp.linalg.qr(_wide(weight))
    return _wide(weight) - update["scale"].astype(q.dtype) * jnp.matmul(q[:, :rank], r[:rank], precision="highest")


def _add(weight: jax.Array, update: Mapping[str, jax.Array], rank: int) -> jax.Array:
    wide = accum_dtype(weight.dtype)
    return weight.astype(wide) + update["scale"].astype(wide) * update["value"].astype(wide)


def _rows(weight: jax.Array, update: Mapping[str, jax.Array], rank: int) -> jax.Array:
    return weight.at[update["rows"]].set(update["value"].astype(weight.dtype))


# `weight` puts a stored tensor in the parameter's place, without a function.
KINDS: dict[str, Callable[[jax.Array, Mapping[str, jax.Array], int], jax.Array] | None] = {
    "weight": None,
    "pissa": _pissa,
    "olora": _olora,
    "lora": _lora,
    "dora": _dora,
    "dora_embedding": functools.partial(_dora, axis=-2),
    "bias": _add,
    "rows": _rows,
}


def merge_updates(
    parameters: Mapping[str, jax.Array], updates: Sequence[Update], disk_shapes: Shapes, sharding_ctx: ShardingContext
) -> dict[str, jax.Array]:
    """Return the parameters with the changes applied, each rounded once to the parameter's dtype.

    Args:
      parameters: by name; the arrays that change are donated.
      updates: of the adapter.
      disk_shapes: the shape of each parameter in the checkpoint, which is that of the adapter's matrices.
      sharding_ctx: the mesh. Weights stay sharded; an adapter's matrices are on every device.

    Raises:
      CheckpointError: the adapter is not of this model; one message lists every problem.
    """
    merged = dict(parameters)
    for update in fit_updates(updates, disk_shapes):
        name, old = update.parameter, merged[update.parameter]
        if update.kind == "weight":
            new = from_disk(update.tensors["value"].astype(old.dtype), disk_shapes[name], old.shape)
            merged[name] = jax.make_array_from_callback(old.shape, old.sharding, new.__getitem__)
            continue
        narrow = {key: value.astype(jax.dtypes.canonicalize_dtype(value.dtype)) for key, value in update.tensors.items()}
        tensors = sharding_ctx.replicate(narrow)
        shape = disk_shapes[name]
        merged[name] = _merge_fn(update.kind, update.rank, tuple(shape), shape.sections, old.sharding)(old, tensors)
    return merged


@functools.lru_cache
def _merge_fn(
    kind: str, rank: int, shape: tuple[int, ...], sections: tuple[int, ...], sharding: jax.sharding.Sharding
) -> Any:
    disk_shape = DiskShape(shape, sections)

    def merge(weight: jax.Array, tensors: Mapping[str, jax.Array]) -> jax.Array:
        function = KINDS[kind]
        assert function is not None
        new = function(on_disk(weight, disk_shape), tensors, rank).astype(weight.dtype)
        return from_disk(new, disk_shape, weight.shape)

    return jax.jit(merge, donate_argnums=0, out_shardings=sharding)


def fit_updates(updates: Sequence[Update], disk_shapes: Shapes) -> list[Update]:
    """Return the updates as they apply to a model with these parameters.

    Raises:
      CheckpointError: the adapter is not of this model; one message lists every problem.
    """
    problems: list[str] = []
    if HEAD not in disk_shapes:
        updates = _tie(updates, problems)
    fitted = []
    for update in updates:
        shape = disk_shapes.get(update.parameter)
        if shape is None:
            problems.append(f"{update.layer} is not of this model, which has no {update.parameter}")
            continue
        if update.names_experts and len(shape) == 3:
            update = _pad_experts(update, shape[0])
        if update.weight_shape(shape) != shape:
            problems.append(wrong_shape(update.layer, update.weight_shape(shape), shape))
        elif update.kind in ("pissa", "olora") and update.rank > min(shape):
            problems.append(f"{update.layer} has rank {update.rank}, but a weight {list(shape)}")
        elif update.kind == "rows" and (row := int(update.tensors["rows"].max())) >= shape[0]:
            problems.append(f"{update.layer} is not of this model: it has a row for token {row} of {shape[0]}")
        else:
            fitted.append(update)
    if problems:
        raise_problems("the adapter does not fit the model", problems)
    return fitted


def wrong_shape(layer: str, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Return the problem of a layer whose adapter is for a weight of another shape."""
    return f"{layer} is not of this model: its adapter is for a weight {list(found)}, the model has {list(shape)}"


def _pad_experts(update: Update, num_experts: int) -> Update:
    """Give the last experts, which the adapter does not name, matrices of zeros and no magnitude."""
    missing = num_experts - len(update.tensors["a"])
    if missing <= 0:
        return update
    fill = {key: np.nan if key == "magnitude" else 0 for key in update.tensors}
    padded = {
        key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1), constant_values=fill[key])
        for key, value in update.tensors.items()
    }
    return dataclasses.replace(update, tensors=padded)


def _tie(updates: Sequence[Update], problems: list[str]) -> list[Update]:
    """Return updates for a model whose head is its embedding: what changes one must change the other in the same way.

    PEFT keeps them alike for trained token rows, and for the rest with `ensure_weight_tying`; otherwise only one of them
    changes, and a model with one matrix for both cannot hold the result.
    """
    head = [update for update in updates if update.parameter == HEAD]
    embedding = [update for update in updates if update.parameter == EMBEDDING]
    for update, others in [*((x, embedding) for x in head), *((x, head) for x in embedding)]:
        is_shared = update.kind == "rows" and update.parameter == EMBEDDING
        is_shared |= update.is_base and not any(other.is_base for other in others)
        if not is_shared and not any(_is_same(update, other) for other in others):
            problems.append(
                f"{update.layer} changes only one of embed_tokens and lm_head, which are one matrix in this model; save "
                "the base with tie_word_embeddings false and its own lm_head.weight, or merge with PEFT"
            )
    has_base = any(update.is_base for update in embedding)
    moved = [dataclasses.replace(x, parameter=EMBEDDING) for x in head if x.is_base and not has_base]
    return [*moved, *(update for update in updates if update.parameter != HEAD)]


def _is_same(one: Update, other: Update) -> bool:
    return (
        one.kind == other.kind
        and one.tensors.keys() == other.tensors.keys()
        and all(np.array_equal(value, other.tensors[key]) for key, value in one.tensors.items())
    )
