"""Low-rank adapters (LoRA, arXiv:2106.09685) to train: new ones beside layers, and what has been trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter import Adapter
from qwen_dist.checkpoint.adapter_layers import add_lora, expert_stacks, linear_layers
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions
from qwen_dist.errors import UsageError
from qwen_dist.models.parameters import disk_shapes, on_disk, random_parameters
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
    return add_lora(module, chosen, options.rank, Adapter(options.rank, options.alpha, options.use_rslora, {}).scale, dtype)


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


def _matches(target: str, name: str) -> bool:
    """Return whether a target names a layer. The experts' gate and up are one matrix, which matches either name."""
    if target == ALL_LINEAR:
        return ".experts." not in name and not name.endswith(".mlp.gate")
    if ".experts.lora." in name and target in ("gate_proj", "up_proj"):
        return name.endswith(".gate_up_proj")
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None
