"""From options to an engine with a loaded model."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import jax

from qwen_dist.checkpoint.adapter import Adapter
from qwen_dist.checkpoint.adapter_layers import stack_adapters, with_adapter
from qwen_dist.checkpoint.adapter_read import PeftAdapter, read_adapter
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.checkpoint.quantized import Quantization
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.generation_config import read_generation_config
from qwen_dist.engine.request import SamplingParams
from qwen_dist.hf_config import read_model_config
from qwen_dist.mesh import MeshConfig, default_mesh, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.dispatch import Backend
from qwen_dist.quantization.options import CACHE_DTYPES, QuantizeOptions
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.tokenizer import Tokenizer


def open_engine(
    options: ModelOptions,
    mesh: str,
    sampling: SamplingOptions,
    *,
    max_batch_size: int = 32,
    cache_bytes: int = 4 * 10**9,
    steps_per_dispatch: int = 1,
    policy: str = "throughput",
    prefix_cache: bool = True,
    snapshot_fraction: float = 0.2,
    adapters: Mapping[str, str] = types.MappingProxyType({}),
    template_variables: Collection[str] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback | None = None,
    announce: Callable[[str], None] = lambda layout: None,
) -> tuple[Engine, Tokenizer, SamplingParams]:
    """Load tokenizer and model; return the engine, the tokenizer and the sampling parameters of requests that set none.

    Args:
      options, sampling: from the configuration.
      mesh: as `MeshConfig.parse` reads it; empty is `default_mesh`.
      max_batch_size, cache_bytes, steps_per_dispatch, policy, prefix_cache, snapshot_fraction: see `Engine`.
      adapters: the directories of adapters that requests choose by their name.
      template_variables: names that the chat template must use.
      devices: the devices of the mesh, by default all of this run.
      progress: see `checkpoint.load.load`.
      announce: called before the weights are read with device, mesh and kernels, and with what may surprise.

    Raises:
      UserError: the mesh, the checkpoint or a sampling parameter cannot be used. Cheap checks run before the weights load.
    """
    devices = jax.devices() if devices is None else devices
    quantize = QuantizeOptions.of_model(options)
    adapter = read_adapter(options.adapter, options.ignored_keys) if options.adapter else None
    named = {name: read_adapter(directory, options.ignored_keys) for name, directory in adapters.items()}
    given = make_mesh(MeshConfig.parse(mesh), devices) if mesh else None
    files = ModelFiles.open(options.path)
    tokenizer = Tokenizer.open(files, options.ignored_keys)
    tokenizer.check_template_variables(template_variables)
    defaults = read_generation_config(files, options.ignored_keys).override(vars(sampling))
    config = read_model_config(files, options.ignored_keys)
    sharding_ctx = ShardingContext(given or _make_default_mesh(options, quantize, files, config, devices), INFERENCE)
    for note in _notes(devices[0], sharding_ctx, config, tokenizer, options.adapter):
        announce(note)
    stacked, factors = stack_adapters(named, disk_shapes(Transformer(config, dtype=options.dtype)) if named else {})
    engine = Engine(
        _load(options, quantize, files, sharding_ctx, adapter, stacked if named else None, progress),
        tokenizer,
        max_batch_size=max_batch_size,
        cache_bytes=cache_bytes,
        cache_dtype=CACHE_DTYPES[options.kv_cache_dtype],
        steps_per_dispatch=steps_per_dispatch,
        policy=policy,
        prefix_cache=prefix_cache,
        snapshot_fraction=snapshot_fraction,
        adapters=factors,
    )
    return engine, tokenizer, defaults


def _make_default_mesh(
    options: ModelOptions,
    quantize: QuantizeOptions | Literal["stored", "none"],
    files: ModelFiles,
    config: ModelConfig,
    devices: Sequence[jax.Device],
) -> jax.sharding.Mesh:
    # Weights that are packed on disk are dequantised, if they are, once they have been read.
    quantization = Quantization.of(files.config, "stored" if quantize == "none" else quantize)
    units = {} if quantization is None else quantization.num_units(config, options.dtype)
    return make_mesh(default_mesh(config, devices, units), devices)


def _load(
    options: ModelOptions,
    quantize: QuantizeOptions | Literal["stored", "none"],
    files: ModelFiles,
    sharding_ctx: ShardingContext,
    merged: PeftAdapter | None,
    unmerged: Adapter | None,
    progress: ProgressCallback | None,
) -> LoadedModel:
    # An adapter stays unmerged if the weights are quantised: they would have to be rounded again.
    if merged is not None and unmerged is None and Quantization.of(files.config, quantize) is not None:
        unmerged, merged = merged.to_lora(), None
    model = load_model(
        files,
        sharding_ctx,
        dtype=options.dtype,
        load_format=options.load_format,
        ignored_config_keys=options.ignored_keys,
        adapter=merged,
        quantize=quantize,
        host_memory_budget=options.host_memory_bytes,
        progress=progress,
    )
    return model if unmerged is None else with_adapter(model, unmerged, dtype=model.dtype)[0]


def _notes(
    device: jax.Device, sharding_ctx: ShardingContext, config: ModelConfig, tokenizer: Tokenizer, adapter: str
) -> Iterator[str]:
    backend = Backend.of(sharding_ctx.mesh, "inference").value
    yield f"{device.platform} ({device.device_kind}), {sharding_ctx.describe()}; implementations: {backend}"
    if note := sharding_ctx.replicated_note(config.vocab_size):
        yield note
    if adapter and (differing := tokenizer.differences(adapter)):
        yield f"{adapter} has its own {' and '.join(differing)}, not used: those of the model are"
