"""From options to an engine that is ready to run."""

from __future__ import annotations

import json
import pathlib

from qwen_dist.checkpoint.hub import local_directory
from qwen_dist.checkpoint.load import Progress
from qwen_dist.checkpoint.model import load_model
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import SamplingParams
from qwen_dist.errors import CheckpointError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.sharding import INFERENCE, Resolver
from qwen_dist.tokenizer import Tokenizer


def open_engine(
    options: ModelOptions,
    mesh: str,
    sampling: SamplingOptions,
    *,
    max_batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[Engine, Tokenizer, SamplingParams]:
    """Load tokenizer and model; also returns how to sample where a request does not say.

    Raises:
      UserError: the mesh, the checkpoint or a sampling parameter cannot be used; cheap checks come before the weights.
    """
    resolver = Resolver(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
    directory = local_directory(options.path, weights=options.load_format != "dummy")
    tokenizer = Tokenizer.from_directory(directory)
    defaults = SamplingParams.from_generation_config(_generation_config(directory)).override(vars(sampling))
    model = load_model(
        directory,
        resolver,
        dtype=options.dtype,
        weights=options.path if "://" in options.path else None,
        load_format=options.load_format,
        ignored_config_keys=options.ignored_keys,
        host_memory_budget=options.host_memory_bytes,
        progress=progress,
    )
    return Engine(model, tokenizer, max_batch_size=max_batch_size), tokenizer, defaults


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
