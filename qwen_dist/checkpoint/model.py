"""Load a model (configuration, module, and parameters on the devices) from a checkpoint, or export it to a new one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
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
from qwen_dist.checkpoint.names import find_layout, name_tensors
from qwen_dist.checkpoint.packed import PackedWeight
from qwen_dist.checkpoint.plan import FLOAT_DTYPES
from qwen_dist.checkpoint.quantized import (
    KeptWeight,
    choose_weights,
    declare_weights,
    dequantize_weights,
    packed_weights,
    random_weights,
)
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.checkpoint.save import check_output, export, read_extra_files, save
from qwen_dist.checkpoint.source import Checkpoint, open_checkpoint
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import UsageError, UserError
from qwen_dist.hf_config import parse_model_config, read_model_config
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import DiskShape, abstract_parameters, disk_shapes, random_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.quantization.stored import read_stored
from qwen_dist.runtime.memory import available_memory, format_gb
from qwen_dist.sharding import ShardingContext
from qwen_dist.storage.model_files import ModelFiles, ModelName

_NO_MERGE = (
    "--adapter is merged into the weights, which are quantised here: give --quantize none, or merge it with "
    "qwen-dist export and quantise the result"
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and its parameters by checkpoint name; `module` is abstract until `with_parameters` is applied.

    Attributes:
      files: those it was loaded from; None for a model that was only declared.
      checkpoint: the opened weights; None where they are random.
      kept: the weights that are kept in fewer bits. The arrays of each have its name and a suffix.
    """

    config: ModelConfig
    module: Transformer
    parameters: dict[str, jax.Array]
    sharding_ctx: ShardingContext
    files: ModelFiles | None = None
    checkpoint: Checkpoint | None = None
    kept: tuple[KeptWeight, ...] = ()

    @property
    def dtype(self) -> jax.numpy.dtype:
        return self.parameters["norm.weight"].dtype

    def num_elements(self) -> dict[str, int]:
        """Return how many numbers each parameter has, adapters included; a quantised one as the array it stands for."""
        adapters = {name: shape for name, shape in disk_shapes(self.module).items() if ".lora_" in name}
        shapes = disk_shapes(Transformer(self.config, dtype=self.dtype)) | adapters
        return {name: math.prod(shape) for name, shape in shapes.items()}


def load_model(
    model: ModelName,
    sharding_ctx: ShardingContext,
    *,
    dtype: DTypeLike,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    ignored_config_keys: Iterable[str] = (),
    adapter: PeftAdapter | None = None,
    quantize: QuantizeOptions | Literal["stored", "none"] = "none",
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
      quantize: weights are kept as the checkpoint has packed them ("stored"), dequantised ("none"), or quantised so.
      host_memory_budget: see `checkpoint.load.load`.
      progress: see `checkpoint.load.load`.

    Raises:
      CheckpointError: the checkpoint cannot be used; every problem of the failing step is listed.
      UsageError: the model does not fit the mesh. This is raised before anything is read.
    """
    files = ModelFiles.open(model)
    config = read_model_config(files, ignored_config_keys)
    module = Transformer(config, dtype=dtype)
    declared = _declared(module, sharding_ctx)  # raises UsageError before anything is read
    updates, shapes = () if adapter is None else adapter.updates, declared.disk_shapes
    fit_updates(updates, shapes)
    checkpoint = None if load_format == "dummy" else _open(files)
    abstract = _quantized(declared, module, files.config, sharding_ctx, quantize, checkpoint)
    _check_memory(abstract.target)
    if updates and abstract.kept and quantize != "none":
        raise UsageError(_NO_MERGE)
    if checkpoint is None:
        parameters = _random(module, abstract, sharding_ctx)
    else:
        parameters = load(
            checkpoint,
            abstract.target,
            disk_shapes=shapes,
            tied=config.tie_word_embeddings,
            packed=abstract.packed,
            host_memory_budget=host_memory_budget,
            progress=progress,
        )
    if quantize == "none" and abstract.kept:
        parameters = dequantize_weights(parameters, abstract.kept, abstract.dequantized)
        abstract, module = declared, Transformer(config, dtype=dtype)
    parameters = merge_updates(parameters, updates, shapes, sharding_ctx)
    return LoadedModel(config, module, parameters, sharding_ctx, files, checkpoint, tuple(abstract.kept))


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """What `load` needs of a model.

    Attributes:
      target: shape, dtype and sharding of every array.
      disk_shapes: the shape on disk of each parameter.
      is_tied: whether the head is the embedding.
      kept, packed: the weights that are kept in fewer bits.
      dequantized: the target without quantisation.
    """

    target: dict[str, jax.ShapeDtypeStruct]
    disk_shapes: dict[str, DiskShape]
    is_tied: bool
    kept: Sequence[KeptWeight] = ()
    packed: Sequence[PackedWeight] = ()
    dequantized: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)


def _declared(module: Transformer, sharding_ctx: ShardingContext) -> AbstractModel:
    """Return what `load` needs of a module without quantisation. Raises UsageError if it does not fit the mesh."""
    target = abstract_parameters(module, sharding_ctx)
    return AbstractModel(target, disk_shapes(module), module.config.tie_word_embeddings, dequantized=target)


def _quantized(
    declared: AbstractModel,
    module: Transformer,
    hf: Mapping[str, Any],
    sharding_ctx: ShardingContext,
    quantize: QuantizeOptions | Literal["stored", "none"],
    checkpoint: Checkpoint | None,
) -> AbstractModel:
    """Declare in a module how its weights are kept, and return what `load` needs of it. Raises as `load_model` does."""
    # FP8 is dequantised while it is read, every other packing after it.
    if quantize == "none" and _is_fp8(hf):
        return declared
    options = quantize if isinstance(quantize, QuantizeOptions) else None
    kept = choose_weights(module, hf, options, None if checkpoint is None else checkpoint.tensors)
    if not kept:
        return declared
    declare_weights(module, kept)
    target, packed = abstract_parameters(module, sharding_ctx), packed_weights(kept, sharding_ctx)
    return dataclasses.replace(declared, target=target, kept=kept, packed=packed)


def _open(files: ModelFiles) -> Checkpoint:
    if jax.process_count() == 1:
        files.download()
    return open_checkpoint(files)


def _random(module: Transformer, abstract: AbstractModel, sharding_ctx: ShardingContext) -> dict[str, jax.Array]:
    names = abstract.target.keys() - {name for one in abstract.packed for name in one.arrays.values()}
    parameters = random_parameters(module, sharding_ctx, names=names)
    return parameters | random_weights(module, abstract.kept, sharding_ctx)


def _is_fp8(hf: Mapping[str, Any]) -> bool:
    stored = read_stored(hf)
    return stored is not None and stored.method == "fp8"


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
        carried = load_carried(model.checkpoint, model.sharding_ctx)
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


def abstract_model(
    checkpoint: Checkpoint,
    sharding_ctx: ShardingContext,
    dtype: DTypeLike,
    ignored_config_keys: Iterable[str] = (),
    quantize: QuantizeOptions | Literal["stored", "none"] = "none",
) -> AbstractModel:
    """Return what `load` needs of the model of a checkpoint. Raises CheckpointError and UsageError as `load_model` does."""
    config = parse_model_config(checkpoint.config, ignored_config_keys)
    module = Transformer(config, dtype=dtype)
    declared = _declared(module, sharding_ctx)
    return _quantized(declared, module, checkpoint.config, sharding_ctx, quantize, checkpoint)


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
    abstract = abstract_model(checkpoint, sharding_ctx, dtype or "float32", ignored_config_keys)
    shapes, is_tied = abstract.disk_shapes, abstract.is_tied
    fit_updates(updates, shapes)
    target = _with_stored_dtypes(abstract, checkpoint, dtype=dtype)
    arrays = load(
        checkpoint,
        target,
        disk_shapes=shapes,
        tied=is_tied,
        packed=abstract.packed,
        host_memory_budget=host_memory_budget,
    )
    if abstract.kept:
        arrays = dequantize_weights(arrays, abstract.kept, _dequantized_target(abstract, dtype))
    arrays = merge_updates(arrays, updates, shapes, sharding_ctx)
    carried = load_carried(checkpoint, sharding_ctx, host_memory_budget=host_memory_budget)
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
    model: AbstractModel, checkpoint: Checkpoint, *, dtype: DTypeLike | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the target with the dtype of each parameter on disk; `dtype` replaces it, but for parameters kept wider.

    What the model keeps wider than `dtype`, such as a delta net's `A_log`, is not widened beyond what is stored. The arrays
    of quantised weights stay as they are.
    """
    packed = {name for one in model.packed for name in one.arrays.values()}
    plain = {name: leaf for name, leaf in model.target.items() if name not in packed}
    shapes = {name: model.disk_shapes[name] for name in plain}
    layout = find_layout(model.disk_shapes, checkpoint.tensors)
    segments = name_tensors(shapes, layout=layout).segments
    result = {name: leaf for name, leaf in model.target.items() if name in packed}
    for name, leaf in plain.items():
        if (tensor := checkpoint.tensors.get(segments[name][0].tensor)) is None:
            result[name] = leaf  # which is an error of `load`, with all others
            continue
        stored = _stored_dtype(tensor)
        is_wide = dtype is not None and leaf.dtype != jnp.dtype(dtype)
        kept = min(leaf.dtype, stored, key=lambda one: one.itemsize) if is_wide else leaf.dtype
        result[name] = jax.ShapeDtypeStruct(leaf.shape, stored if dtype is None else kept, sharding=leaf.sharding)
    return result


def _dequantized_target(model: AbstractModel, dtype: DTypeLike | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the target of quantised weights that are exported: in `dtype`, by default bfloat16."""
    leaves = {one.weight.name: model.dequantized[one.weight.name] for one in model.kept}
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or jnp.bfloat16), sharding=leaf.sharding)
        for name, leaf in leaves.items()
    }


def _stored_dtype(tensor: TensorInfo) -> np.dtype:
    """Return the dtype in which a tensor is saved by default. Raises UsageError if it is not a floating one."""
    if tensor.dtype.name in FP8_DTYPES:
        return np.dtype(jnp.bfloat16)
    if tensor.dtype.name not in FLOAT_DTYPES:
        raise UsageError(f"{tensor.name} is {tensor.dtype.name}; choose the dtype to save with --dtype")
    return np.dtype(tensor.dtype.numpy)
