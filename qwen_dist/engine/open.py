"""From options to an engine with a loaded model."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Collection, Sequence

import jax

from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.hub import local_directory
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import load_model
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import SamplingParams
from qwen_dist.errors import CheckpointError
from qwen_dist.mesh import MeshConfig, default_mesh, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.sharding import INFERENCE, ShardingContext
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
    template_variables: Collection[str] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback | None = None,
    announce: Callable[[str], None] = lambda layout: None,
) -> tuple[Engine, Tokenizer, SamplingParams]:
    """Load tokenizer and model; return the engine, the tokenizer and the sampling parameters of requests that set none.

    Args:
      options, sampling: from the configuration.
      mesh: as `MeshConfig.parse` reads it; empty is `default_mesh`.
      max_batch_size, cache_bytes, steps_per_dispatch, policy: see `Engine`.
      template_variables: names that the chat template must use.
      devices: the devices of the mesh, by default all of this run.
      progress: see `checkpoint.load.load`.
      announce: called with a description of the mesh before the weights are read, if there are several devices.

    Raises:
      UserError: the mesh, the checkpoint or a sampling parameter cannot be used. Cheap checks run before the weights load.
    """
    devices = jax.devices() if devices is None else devices
    adapter = read_adapter(options.adapter, options.ignored_keys) if options.adapter else None
    given = make_mesh(MeshConfig.parse(mesh), devices) if mesh else None
    directory = local_directory(options.path, weights=options.load_format != "dummy")
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.check_template_variables(template_variables)
    defaults = SamplingParams.from_generation_config(_generation_config(directory)).override(vars(sampling))
    chosen = given or make_mesh(default_mesh(ModelConfig.from_directory(directory, options.ignored_keys), devices), devices)
    sharding_ctx = ShardingContext(chosen, INFERENCE)
    if len(devices) > 1:
        announce(sharding_ctx.describe())
    model = load_model(
        directory,
        sharding_ctx,
        dtype=options.dtype,
        weights=options.path if "://" in options.path else None,
        load_format=options.load_format,
        ignored_config_keys=options.ignored_keys,
        adapter=adapter,
        host_memory_budget=options.host_memory_bytes,
        progress=progress,
    )
    engine = Engine(
        model,
        tokenizer,
        max_batch_size=max_batch_size,
        cache_bytes=cache_bytes,
        steps_per_dispatch=steps_per_dispatch,
        policy=policy,
    )
    return engine, tokenizer, defaults


def _generation_config(directory: pathlib.Path) -> dict:
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds {content!r:.80}")
    return content
