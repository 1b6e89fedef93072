"""Low-rank adapters (LoRA, arXiv:2106.09685): add them to layers, start from an existing one, extract the trained one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter import Adapter, base_weight_name
from qwen_dist.checkpoint.adapter_config import raise_problems
from qwen_dist.checkpoint.adapter_merge import wrong_shape
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions
from qwen_dist.errors import UsageError
from qwen_dist.models.layers import Linear
from qwen_dist.models.moe import EXPERT_MATRICES, Experts
from qwen_dist.models.parameters import abstract_parameters, disk_shapes, from_disk, on_disk, random_parameters
from qwen_dist.models.transformer import Transformer

# As a target, all linear layers of the blocks but routers and experts; in a dense model those of PEFT's target.
ALL_LINEAR = "all-linear"


def new_adapter(model: LoadedModel, options: LoraOptions, *, dtype: DTypeLike) -> tuple[LoadedModel, list[str]]:
    """Add new adapters to the linear layers of a model; the outputs of the model do not change.

    Args:
      model: the loaded model.
      options: rank, scale and target layers.
      dtype: of the adapters' parameters.

    Returns:
      The model with adapters, and the names of the adapters' parameters.

    Raises:
      UsageError: a target matches no layer.
    """
    trained = attach_lora(model.module, options, dtype=dtype)
    parameters = model.parameters | random_parameters(model.module, model.sharding_ctx, names=trained)
    return dataclasses.replace(model, parameters=parameters), trained


def attach_lora(module: Transformer, options: LoraOptions, *, dtype: DTypeLike) -> list[str]:
    """Declare adapters on the linear layers that match the targets, without values.

    Returns:
      The names of the adapters' parameters.

    Raises:
      UsageError: a target matches no layer.
    """
    layers = [*(name for name, _ in linear_layers(module)), *expert_stacks(module)]
    matches = {target: [name for name in layers if _matches(target, name)] for target in options.target_modules}
    if unused := [target for target, names in matches.items() if not names]:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise UsageError(
            f"lora.target_modules: {', '.join(unused)} matches no linear layer; the layers are {', '.join(known)}"
        )
    chosen = {name for names in matches.values() for name in names}
    return _add_lora(
        module, chosen, options.rank, Adapter(options.rank, options.alpha, options.use_rslora, {}).scale, dtype
    )


def with_adapter(model: LoadedModel, adapter: Adapter, *, dtype: DTypeLike) -> tuple[LoadedModel, list[str]]:
    """Add an existing adapter to a model, to train it further.

    Returns:
      The model with the adapter, and the names of the adapter's parameters.

    Raises:
      CheckpointError: the adapter does not fit the model.
    """
    _check_fits(adapter, model.module)
    trained = _add_lora(model.module, adapter.layers, adapter.rank, adapter.scale, dtype)
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


def extract_adapter(
    parameters: Mapping[str, jax.Array],
    options: LoraOptions,
    model: LoadedModel,
) -> Adapter:
    """Return the trained adapter of a model as NumPy matrices, on every process."""
    replicate = jax.jit(lambda x: x, out_shardings=model.sharding_ctx.replicated())
    shapes = disk_shapes(model.module)
    arrays = {name: on_disk(np.asarray(replicate(value)), shapes[name]) for name, value in parameters.items()}
    return Adapter(options.rank, options.alpha, options.use_rslora, arrays)


def _add_lora(module: Transformer, layers: Container[str], rank: int, scale: float, dtype: DTypeLike) -> list[str]:
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


def _matches(target: str, name: str) -> bool:
    """Return whether a target names a layer. The experts' gate and up are one matrix, which matches either name."""
    if target == ALL_LINEAR:
        return ".experts." not in name and not name.endswith(".mlp.gate")
    if ".experts.lora." in name and target in ("gate_proj", "up_proj"):
        return name.endswith(".gate_up_proj")
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None
