"""Adapters beside the layers of a model, unmerged: one to train further, or several for requests to choose from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter import Adapter, base_weight_name
from qwen_dist.checkpoint.adapter_config import raise_problems
from qwen_dist.checkpoint.adapter_merge import Shapes, Update, fit_updates, wrong_shape
from qwen_dist.checkpoint.adapter_read import PeftAdapter, describe
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.errors import CheckpointError, printable
from qwen_dist.models.layers import Linear
from qwen_dist.models.moe import EXPERT_MATRICES, Experts
from qwen_dist.models.parameters import abstract_parameters, disk_shapes, from_disk
from qwen_dist.models.transformer import Transformer


def stack_adapters(adapters: Mapping[str, PeftAdapter], shapes: Shapes) -> tuple[Adapter, dict[str, np.ndarray]]:
    """Stack adapters along their ranks, so that a layer has one pair of matrices for all of them.

    Args:
      adapters: by the names that requests choose them by.
      shapes: of the model's parameters.

    Returns:
      The stacked adapter, of R ranks and the scale 1, and for each name the factors [R] that select its ranks and scale
      them.

    Raises:
      CheckpointError: an adapter does not fit the model, or is more than LoRA of the blocks' linear layers.
    """
    updates = {name: _plain_updates(name, adapter, shapes) for name, adapter in adapters.items()}
    ranks = {name: max(update.rank for update in of_name) for name, of_name in updates.items()}
    arrays: dict[str, np.ndarray] = {}
    factors = {name: np.zeros(sum(ranks.values()), np.float32) for name in adapters}
    for name, start in zip(ranks, itertools.accumulate(ranks.values(), initial=0), strict=False):
        scale = float(updates[name][0].tensors["scale"]) or 1.0
        factors[name][start : start + ranks[name]] = scale
        for update in updates[name]:
            part, relative = slice(start, start + update.rank), float(update.tensors["scale"]) / scale
            (out_size, _), (_, in_size) = update.tensors["b"].shape, update.tensors["a"].shape
            a = arrays.setdefault(f"{update.layer}.lora_A.weight", np.zeros((len(factors[name]), in_size), np.float32))
            b = arrays.setdefault(f"{update.layer}.lora_B.weight", np.zeros((out_size, len(factors[name])), np.float32))
            a[part], b[:, part] = update.tensors["a"], relative * update.tensors["b"].astype(np.float32)
    rank = sum(ranks.values())
    return Adapter(rank, rank, False, arrays), factors


def _plain_updates(name: str, adapter: PeftAdapter, shapes: Shapes) -> list[Update]:
    try:
        updates = fit_updates(adapter.updates, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"the adapter {printable(name, 60)}: {error}") from None
    problems = [
        f"{update.layer}: {describe(update)}"
        for update in updates
        if update.kind != "lora" or not update.layer.startswith("layers.") or ".experts." in update.layer
    ]
    if problems:
        what = f"the adapter {printable(name, 60)} has more than LoRA of linear layers"
        raise_problems(f"{what}; merge it with `qwen-dist export --adapter`", problems)
    return updates


def with_adapter(model: LoadedModel, adapter: Adapter, *, dtype: DTypeLike) -> tuple[LoadedModel, list[str]]:
    """Add an existing adapter to a model, beside its layers.

    Returns:
      The model with the adapter, and the names of the adapter's parameters.

    Raises:
      CheckpointError: the adapter does not fit the model.
    """
    _check_fits(adapter, model.module)
    trained = add_lora(model.module, adapter.layers, adapter.rank, adapter.scale, dtype)
    targets, shapes = abstract_parameters(model.module, model.sharding_ctx), disk_shapes(model.module)
    parameters = dict(model.parameters)
    for name in trained:
        target = targets[name]
        values = from_disk(adapter.arrays[name].astype(target.dtype), shapes[name], target.shape)
        parameters[name] = jax.make_array_from_callback(target.shape, target.sharding, values.__getitem__)
    return dataclasses.replace(model, parameters=parameters), trained


def _check_fits(adapter: Adapter, module: Transformer) -> None:
    shapes, layers = disk_shapes(module), {name for name, _ in linear_layers(module)} | expert_stacks(module).keys()
    problems = []
    for layer in adapter.layers:
        a, b = (adapter.arrays[f"{layer}.lora_{side}.weight"].shape for side in "AB")
        shape, found = shapes.get(base_weight_name(layer)), (*b[:-1], a[-1])
        if layer not in layers or shape is None:
            problems.append(f"{layer} is not of this model, which has no such linear layer")
        elif shape != found:
            problems.append(wrong_shape(layer, found, shape))
    if problems:
        raise_problems("the adapter does not fit the model", problems)


def add_lora(module: Transformer, layers: Container[str], rank: int, scale: float, dtype: DTypeLike) -> list[str]:
    """Declare adapters on these layers, without values. Return the names of the adapters' parameters."""
    for name, layer in list(linear_layers(module)):
        if name in layers:
            layer.add_lora(rank, scale, dtype=dtype)
    for name, experts in expert_stacks(module).items():
        if name in layers:
            experts.add_lora(name.rpartition(".")[2], rank, scale, dtype=dtype)
    return [name for name in disk_shapes(module) if ".lora_" in name]


def linear_layers(module: Transformer) -> Iterator[tuple[str, Linear]]:
    """Yield the linear layers of the blocks with their names, such as `layers.0.self_attn.q_proj`."""
    for path, layer in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if isinstance(layer, Linear) and name.startswith("layers."):
            yield name, layer


def expert_stacks(module: Transformer) -> dict[str, Experts]:
    """Return the modules of stacked experts by the name of their adapter, such as `layers.0.mlp.experts.lora.down_proj`."""
    modules = [(".".join(map(str, path)), layer) for path, layer in nnx.iter_modules(module)]
    return {
        f"{name}.lora.{stack}": layer for name, layer in modules if isinstance(layer, Experts) for stack in EXPERT_MATRICES
    }
