"""From a checkpoint to a model that can run: configuration, module, and parameters on the devices."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
from jax.typing import DTypeLike

from qwen_dist.checkpoint.load import Progress, load
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.transformer import Transformer
from qwen_dist.sharding import Resolver, abstract_parameters, disk_shapes, random_parameters


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and its parameters, by checkpoint name; `module` is abstract until `sharding.bind` puts them in."""

    config: ModelConfig
    module: Transformer
    parameters: dict[str, jax.Array]
    resolver: Resolver

    @property
    def dtype(self) -> jax.numpy.dtype:
        return self.parameters["embed_tokens.weight"].dtype


def load_model(
    directory: str | pathlib.Path,
    resolver: Resolver,
    *,
    dtype: DTypeLike,
    weights: str | None = None,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    ignored_config_keys: Iterable[str] = (),
    host_memory_budget: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a checkpoint onto the resolver's mesh.

    Args:
      directory: a checkpoint directory; for load_format "dummy" a directory with a `config.json`, or such a file, is
        enough.
      resolver: the mesh and the rules.
      dtype: of the parameters and the computation.
      weights: where the weights are if not in `directory`: any location that `open_checkpoint` takes.
      load_format: "dummy" makes random weights on the devices instead of reading any.
      ignored_config_keys: keys of config.json that the user vouches for.
      host_memory_budget: see `checkpoint.load.load`.
      progress: see `checkpoint.load.load`.

    Raises:
      CheckpointError: the checkpoint cannot be used; every problem of the failing step is listed.
      UsageError: the model does not fit the mesh; nothing has been read then.
    """
    config = ModelConfig.from_directory(directory, ignored_config_keys)
    module = Transformer(config, dtype=dtype)
    target = abstract_parameters(module, resolver)
    if load_format == "dummy":
        return LoadedModel(config, module, random_parameters(module, resolver), resolver)
    parameters = load(
        open_checkpoint(weights or directory),
        target,
        disk_shapes=disk_shapes(module),
        tied=config.tie_word_embeddings,
        host_memory_budget=host_memory_budget,
        progress=progress,
    )
    return LoadedModel(config, module, parameters, resolver)
