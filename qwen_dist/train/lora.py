"""Low-rank adapters (arXiv:2106.09685) on a model: which layers have them, what they begin as, and what becomes of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter import Adapter, check_fits
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions
from qwen_dist.errors import UsageError
from qwen_dist.models.layers import Linear
from qwen_dist.models.moe import EXPERT_MATRICES, Experts
from qwen_dist.models.parameters import abstract_parameters, disk_shapes, random_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.sharding import ShardingContext


def new_adapter(model: LoadedModel, options: LoraOptions, *, dtype: DTypeLike) -> tuple[LoadedModel, list[str]]:
    """The model with new adapters on its linear layers, which leave it as it is; and the names of their parameters.

    Raises UsageError when a target matches no layer.
    """
    trained = attach(model.module, options, dtype=dtype)
    parameters = model.parameters | random_parameters(model.module, model.sharding_ctx, names=trained)
    return dataclasses.replace(model, parameters=parameters), trained


def attach(module: Transformer, options: LoraOptions, *, dtype: DTypeLike) -> list[str]:
    """Give the linear layers that match an adapter, still without values; returns the names of its parameters.

    Raises UsageError when a target matches no layer.
    """
    layers = [*(name for name, _ in linear_layers(module)), *expert_stacks(module)]
    matches = {target: [name for name in layers if _matches(target, name)] for target in options.target_modules}
    if unused := [target for target, names in matches.items() if not names]:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise UsageError(f"lora.target_modules: {', '.join(unused)} matches no linear layer; there are {', '.join(kinds)}")
    chosen = {name for names in matches.values() for name in names}
    return _attach_to(
        module, chosen, options.rank, Adapter(options.rank, options.alpha, options.use_rslora, {}).scale, dtype
    )


def with_adapter(model: LoadedModel, adapter: Adapter, *, dtype: DTypeLike) -> tuple[LoadedModel, list[str]]:
    """The model with an adapter that can be trained further; and the names of its parameters.

    Raises CheckpointError when the adapter is not of this model.
    """
    check_fits(adapter, {name: leaf.shape for name, leaf in model.parameters.items()})
    trained = _attach_to(model.module, adapter.layers, adapter.rank, adapter.scale, dtype)
    places = abstract_parameters(model.module, model.sharding_ctx)
    parameters = dict(model.parameters)
    for name in trained:
        place = places[name]
        values = adapter.arrays[name].astype(place.dtype).reshape(place.shape)
        parameters[name] = jax.make_array_from_callback(place.shape, place.sharding, values.__getitem__)
    return dataclasses.replace(model, parameters=parameters), trained


def adapter_of(parameters: Mapping[str, jax.Array], options: LoraOptions, sharding_ctx: ShardingContext) -> Adapter:
    """The trained adapter on the host of every process, in matrices."""
    everywhere = jax.jit(lambda x: x, out_shardings=sharding_ctx.replicated())
    arrays: dict[str, np.ndarray] = {}
    for name, value in parameters.items():
        whole = np.asarray(everywhere(value))
        if ".experts.lora." in name:
            arrays[name] = whole.reshape(len(whole), -1, whole.shape[-1])
        else:
            arrays[name] = whole.reshape(len(whole), -1) if ".lora_A." in name else whole.reshape(-1, whole.shape[-1])
    return Adapter(options.rank, options.alpha, options.use_rslora, arrays)


def _attach_to(module: Transformer, layers: Container[str], rank: int, scale: float, dtype: DTypeLike) -> list[str]:
    for name, layer in list(linear_layers(module)):
        if name in layers:
            layer.add_lora(rank, scale, dtype=dtype)
    for name, experts in expert_stacks(module).items():
        if name in layers:
            experts.add_lora(name.rpartition(".")[2], rank, scale, dtype=dtype)
    return [name for name in disk_shapes(module) if ".lora_" in name]


def linear_layers(module: Transformer) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the blocks by name, such as `layers.0.self_attn.q_proj`."""
    for path, layer in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if isinstance(layer, Linear) and name.startswith("layers."):
            yield name, layer


def expert_stacks(module: Transformer) -> dict[str, Experts]:
    """The stacks of experts' matrices by the name of their adapter, such as `layers.0.mlp.experts.lora.down_proj`."""
    modules = [(".".join(map(str, path)), layer) for path, layer in nnx.iter_modules(module)]
    return {
        f"{name}.lora.{stack}": layer for name, layer in modules if isinstance(layer, Experts) for stack in EXPERT_MATRICES
    }


def _matches(target: str, name: str) -> bool:
    """Gate and up of experts are one matrix, which answers to either name."""
    if ".experts.lora." in name and target in ("gate_proj", "up_proj"):
        return name.endswith(".gate_up_proj")
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None
