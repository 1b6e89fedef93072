"""Load a model (configuration, module, and parameters on the devices) from a checkpoint, or export it to a new one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter_merge import fit_updates, merge_updates
from qwen_dist.checkpoint.adapter_read import PeftAdapter, read_adapter
from qwen_dist.checkpoint.carried import load_carried
from qwen_dist.checkpoint.fp8 import FP8_DTYPES
from qwen_dist.checkpoint.load import ProgressCallback, load
from qwen_dist.checkpoint.names import find_layout, map_names
from qwen_dist.checkpoint.plan import FLOAT_DTYPES
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.checkpoint.save import check_output, export, read_extra_files, save
from qwen_dist.checkpoint.source import Checkpoint, open_checkpoint
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import UsageError, UserError
from qwen_dist.hf_config import parse_model_config, read_model_config
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import DiskShape, abstract_parameters, disk_shapes, random_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.runtime.memory import available_memory, format_gb
from qwen_dist.sharding import ShardingContext
from qwen_dist.storage.model_files import ModelFiles, ModelName


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and its parameters by checkpoint name; `module` is abstract until `with_parameters` is applied.

    Attributes:
      files: those it was loaded from; None for a model that was only declared.
      checkpoint: the opened weights; None where they are random.
    """

    config: ModelConfig
    module: Transformer
    parameters: dict[str, jax.Array]
    sharding_ctx: ShardingContext
    files: ModelFiles | None = None
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> jax.numpy.dtype:
        return self.parameters["embed_tokens.weight"].dtype


def load_model(
    model: ModelName,
    sharding_ctx: ShardingContext,
    *,
    dtype: DTypeLike,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    ignored_config_keys: Iterable[str] = (),
    adapter: PeftAdapter | None = None,
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
) -> LoadedModel:
    """Load a checkpoint onto the mesh of `sharding_ctx`.

    Args:
      model: as `ModelFiles.open` takes it; for load_format "dummy" a `config.json` is enough. One process downloads a hub
        id to the hub's cache; several read from the hub what each of them needs.
      sharding_ctx: the mesh and the sharding rules.
      dtype: the dtype of the parameters and of the computation.
      load_format: "dummy" makes random weights on the devices instead of reading any.
      ignored_config_keys: unknown keys of config.json that the user allows.
      adapter: is merged into the weights. That it fits them is checked before they are read.
      host_memory_budget: see `checkpoint.load.load`.
      progress: see `checkpoint.load.load`.

    Raises:
      CheckpointError: the checkpoint cannot be used; every problem of the failing step is listed.
      UsageError: the model does not fit the mesh. This is raised before anything is read.
    """
    files = ModelFiles.open(model)
    config = read_model_config(files, ignored_config_keys)
    module = Transformer(config, dtype=dtype)
    target = abstract_parameters(module, sharding_ctx)  # raises UsageError before anything is read
    updates, shapes = () if adapter is None else adapter.updates, disk_shapes(module)
    fit_updates(updates, shapes)
    _check_memory(target)
    checkpoint = None
    if load_format == "dummy":
        parameters = random_parameters(module, sharding_ctx)
    else:
        if jax.process_count() == 1:
            files.download()
        checkpoint = open_checkpoint(files)
        parameters = load(
            checkpoint,
            target,
            disk_shapes=shapes,
            tied=config.tie_word_embeddings,
            host_memory_budget=host_memory_budget,
            progress=progress,
        )
    parameters = merge_updates(parameters, updates, shapes, sharding_ctx)
    return LoadedModel(config, module, parameters, sharding_ctx, files, checkpoint)


def _check_memory(target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise UserError if the weights on the CPU devices of this process alone are larger than its available memory."""
    needed = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) * len(leaf.sharding.addressable_devices)
        for leaf in target.values()
        if leaf.sharding is not None and next(iter(leaf.sharding.device_set)).platform == "cpu"
    )
    available = available_memory()
    if needed > available:
        raise UserError(
            f"not enough memory: the weights need {format_gb(needed)} and {format_gb(available)} are available. Use a "
            "smaller --dtype such as bfloat16, or more hosts with --mesh; `qwen-dist plan` estimates what is needed"
        )


def save_model(
    model: LoadedModel,
    parameters: Mapping[str, jax.Array],
    output: str | os.PathLike[str],
    *,
    dtype: DTypeLike,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a loaded model with other values of its parameters, and all else that its checkpoint has.

    Args:
      model: from `load_model`.
      parameters: all of the model's, by name.
      output: see `checkpoint.save.save`.
      dtype: on disk, but for parameters that the model keeps wider.
      extra_files: contents of files that replace those of the checkpoint, by name.
      overwrite: see `checkpoint.save.save`.

    Raises:
      CheckpointError: the output exists or cannot be written; it is left unchanged.
    """
    assert model.files is not None
    declared = abstract_parameters(Transformer(model.config, dtype=dtype), model.sharding_ctx)
    shapes, carried, layout = disk_shapes(model.module), None, None
    if model.checkpoint is not None:
        layout = find_layout(parameters, model.checkpoint.tensors)
        carried = load_carried(model.checkpoint, shapes, model.sharding_ctx, tied=model.config.tie_word_embeddings)
    save(
        parameters,
        output,
        config=model.files.config,
        disk_shapes=shapes,
        layout=layout,
        carried=carried,
        extra_files=read_extra_files(model.files.folder) | dict(extra_files or {}),
        dtypes={name: leaf.dtype for name, leaf in declared.items()},
        overwrite=overwrite,
    )


AbstractModel = tuple[dict[str, jax.ShapeDtypeStruct], dict[str, DiskShape], bool]


def abstract_model(
    hf: Mapping[str, Any], sharding_ctx: ShardingContext, dtype: DTypeLike, ignored_config_keys: Iterable[str] = ()
) -> AbstractModel:
    """Return what `load` needs of the model in a `config.json`: target, shapes on disk, and whether the head is tied.

    Raises CheckpointError and UsageError as `load_model` does.
    """
    config = parse_model_config(hf, ignored_config_keys)
    module = Transformer(config, dtype=dtype)
    return abstract_parameters(module, sharding_ctx), disk_shapes(module), config.tie_word_embeddings


def export_model(
    model: ModelName,
    sharding_ctx: ShardingContext,
    output: str,
    *,
    adapter: str = "",
    dtype: DTypeLike | None = None,
    ignored_config_keys: Iterable[str] = (),
    max_shard_bytes: int,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Load a checkpoint onto the mesh and save it as a Hugging Face directory.

    `adapter` is a directory in PEFT's layout; it is merged into the weights. `dtype` None keeps that of each tensor
    (bfloat16 for a quantised one). Tensors that the text model does not use are copied. Other arguments and errors as for
    `load_model` and `checkpoint.save.save`.
    """
    with sync_processes("checking the output"):
        if jax.process_index() == 0:
            check_output(output, overwrite=overwrite)
    updates = read_adapter(adapter, ignored_config_keys).updates if adapter else ()
    checkpoint = open_checkpoint(model)
    target, shapes, is_tied = abstract_model(checkpoint.config, sharding_ctx, dtype or "float32", ignored_config_keys)
    fit_updates(updates, shapes)
    target = _with_stored_dtypes(target, shapes, checkpoint, is_tied=is_tied, dtype=dtype)
    arrays = load(checkpoint, target, disk_shapes=shapes, tied=is_tied, host_memory_budget=host_memory_budget)
    arrays = merge_updates(arrays, updates, shapes, sharding_ctx)
    carried = load_carried(checkpoint, shapes, sharding_ctx, tied=is_tied, host_memory_budget=host_memory_budget)
    export(
        checkpoint,
        arrays,
        output,
        disk_shapes=shapes,
        carried=carried,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        host_memory_budget=host_memory_budget,
        progress=progress,
    )


def _with_stored_dtypes(
    target: Mapping[str, jax.ShapeDtypeStruct],
    shapes: Mapping[str, DiskShape],
    checkpoint: Checkpoint,
    *,
    is_tied: bool,
    dtype: DTypeLike | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the target with the dtype of each parameter on disk; `dtype` replaces it, but for parameters kept wider.

    What the model keeps wider than `dtype`, such as a delta net's `A_log`, is not widened beyond what is stored.
    """
    names = map_names(shapes, checkpoint.tensors, tied=is_tied)
    result = {}
    for name, leaf in target.items():
        stored = _stored_dtype(checkpoint.tensors[names.segments[name][0].tensor])
        is_wide = dtype is not None and leaf.dtype != jnp.dtype(dtype)
        kept = min(leaf.dtype, stored, key=lambda one: one.itemsize) if is_wide else leaf.dtype
        result[name] = jax.ShapeDtypeStruct(leaf.shape, stored if dtype is None else kept, sharding=leaf.sharding)
    return result


def _stored_dtype(tensor: TensorInfo) -> np.dtype:
    """Return the dtype in which a tensor is saved by default. Raises UsageError if it is not a floating one."""
    if tensor.dtype.name in FP8_DTYPES:
        return np.dtype(jnp.bfloat16)
    if tensor.dtype.name not in FLOAT_DTYPES:
        raise UsageError(f"{tensor.name} is {tensor.dtype.name}; choose the dtype to save with --dtype")
    return np.dtype(tensor.dtype.numpy)
