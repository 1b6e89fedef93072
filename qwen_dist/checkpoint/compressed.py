"""Write a checkpoint with quantised weights in the formats of compressed-tensors, which transformers and vLLM load.

Values of 8 and 4 bits are pack-quantized: int32 words along the in-features, low bits first, plus 2^(bits - 1). FP8 is
float-quantized: the values as they are, with a scale for each row.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.checkpoint.calibration import calibrate
from qwen_dist.checkpoint.carried import load_carried
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.checkpoint.names import Layout, find_layout, name_tensors
from qwen_dist.checkpoint.quantized import KeptWeight
from qwen_dist.checkpoint.save import MAX_SHARD_BYTES, check_output, read_extra_files, save
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import UsageError
from qwen_dist.models.layers import Linear
from qwen_dist.models.parameters import DiskShape, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.grouped_weight import SCALE, unpack_runs
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.sharding import ShardingContext
from qwen_dist.storage.model_files import ModelName

# Parts of multimodal models and of multi-token prediction, which are saved as they are.
_OTHER_MODULES = (r"re:.*visual\..*", r"re:.*mtp\..*")


def quantize_checkpoint(
    model: ModelName,
    sharding_ctx: ShardingContext,
    output: str,
    options: QuantizeOptions,
    *,
    dtype: DTypeLike,
    calibration: Sequence[int] = (),
    ignored_config_keys: Iterable[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> None:
    """Load a checkpoint onto the mesh, quantised, and save it.

    `calibration` has the tokens of a text, see `calibration.calibrate`. With it the model without quantisation is in
    memory, too. `announce` gets a line for each layer that is rounded. Other arguments and errors as for `load_model` and
    `save`.
    """
    if options.encoding.startswith("float8") and options.group_size:
        raise UsageError("fp8 is written with one scale of each row: leave out --quantize-group-size, or give 0")
    with sync_processes("checking the output"):
        if jax.process_index() == 0:
            check_output(output, overwrite=overwrite)
    load = functools.partial(
        load_model,
        model,
        sharding_ctx,
        dtype=dtype,
        ignored_config_keys=ignored_config_keys,
        host_memory_budget=host_memory_budget,
        progress=progress,
    )
    loaded = load(quantize=options)
    if calibration:
        loaded = calibrate(load(quantize="none"), loaded, calibration, announce)
    save_compressed(
        loaded,
        output,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        host_memory_budget=host_memory_budget,
    )


def save_compressed(
    model: LoadedModel,
    output: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
) -> None:
    """Save a model whose weights were quantised while it was loaded, with all else that its checkpoint has.

    Raises:
      CheckpointError: the output exists or cannot be written; it is left unchanged.
    """
    assert model.files is not None and model.checkpoint is not None and model.kept
    form = model.kept[0].form
    is_float = form.encoding.startswith("float8")
    plain_shapes = disk_shapes(Transformer(model.config, dtype=model.dtype))
    # Packed experts are one matrix for each expert.
    layout = Layout(find_layout(plain_shapes, model.checkpoint.tensors).prefix)
    arrays, shapes = dict(model.parameters), dict(plain_shapes)
    names_of_shape: dict[str, tuple[int, int]] = {}
    for one in model.kept:
        del shapes[one.weight.name]
        values, scale = (arrays.pop(one.weight.name + suffix) for suffix in ("", SCALE))
        leaf = "weight" if is_float else "weight_packed"
        stored = values.reshape(*one.weight.shape[: values.ndim - 2], -1) if is_float else _words(one, values)
        for name, array in ((_leaf(one, leaf), stored), (_leaf(one, "weight_scale"), scale[..., 0])):
            arrays[name] = array
            shapes[name] = DiskShape((*one.weight.disk_shape[:-1], array.shape[-1]), one.weight.disk_shape.sections)
        names_of_shape |= {} if is_float else dict(_matrices(one, layout))
    carried = load_carried(model.checkpoint, model.sharding_ctx, host_memory_budget=host_memory_budget)
    with jax.enable_x64(True):  # the shapes are 64-bit integers
        replicated = model.sharding_ctx.replicate({name: np.array(shape) for name, shape in names_of_shape.items()})
    save(
        arrays,
        output,
        config=model.files.config,
        quantization=_quantization_config(model, layout, with_others=bool(carried)),
        disk_shapes=shapes,
        layout=layout,
        carried=carried | replicated,
        extra_files=read_extra_files(model.files.folder),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        host_memory_budget=host_memory_budget,
    )


def _leaf(kept: KeptWeight, leaf: str) -> str:
    """Return the name of a tensor of a weight; of experts also that of the values has one."""
    return f"{kept.weight.name.removesuffix('.weight')}.{leaf}"


def _matrices(kept: KeptWeight, layout: Layout) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name on disk and the value of each `weight_shape`."""
    named = {_leaf(kept, "weight_shape"): kept.weight.disk_shape}
    for segments in name_tensors(named, layout=layout).segments.values():
        for segment in segments:
            yield segment.tensor, (segment.shape[-2], segment.shape[-1])


@jax.jit
def _int4_words(values: jax.Array) -> jax.Array:
    unsigned = (unpack_runs(values) + jnp.int8(8)).astype(jnp.uint8)
    unsigned = unsigned.reshape(*values.shape[:-2], -1)
    return _as_words(unsigned[..., 0::2] | unsigned[..., 1::2] << 4)


@jax.jit
def _int8_words(values: jax.Array) -> jax.Array:
    return _as_words(values.view(jnp.uint8).reshape(*values.shape[:-2], -1) ^ jnp.uint8(128))


def _as_words(data: jax.Array) -> jax.Array:
    """View bytes [..., N] as int32 [..., ⌈N / 4⌉], padded with zeros."""
    padded = jnp.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, -data.shape[-1] % 4)])
    return jax.lax.bitcast_convert_type(padded.reshape(*data.shape[:-1], -1, 4), jnp.int32)


def _words(kept: KeptWeight, values: jax.Array) -> jax.Array:
    return (_int4_words if kept.form.encoding == "int4" else _int8_words)(values)


def _quantization_config(model: LoadedModel, layout: Layout, *, with_others: bool) -> dict[str, Any]:
    """Return the `quantization_config` of what is written."""
    form = model.kept[0].form
    is_float, is_grouped = form.encoding.startswith("float8"), form.num_groups > 1
    weights: dict[str, Any] = {
        "num_bits": 4 if form.encoding == "int4" else 8,
        "type": "float" if is_float else "int",
        "symmetric": True,
        "strategy": "group" if is_grouped else "channel",
        "group_size": form.group_size if is_grouped else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    kept = {one.weight.name.removesuffix(".weight") for one in model.kept}
    ignored = [name for name in _linear_names(model.module) if name not in kept]
    if model.config.tie_word_embeddings:
        ignored.append("lm_head")
    ignored = [layout.prefix[name == "lm_head"] + name for name in ignored]
    activations = {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if is_float else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored + (list(_OTHER_MODULES) if with_others else []),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **activations}},
    }


def _linear_names(module: Transformer) -> list[str]:
    named = ((".".join(map(str, path)), layer) for path, layer in nnx.iter_modules(module))
    return [name for name, layer in named if isinstance(layer, Linear)]
