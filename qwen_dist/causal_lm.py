"""The Python door to the model: its parameters on a mesh, logits, loss and gradients, for your own training loops.

Letters: B rows, T tokens, V vocab.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import LoadedModel, save_model
from qwen_dist.checkpoint.model import load_model as load
from qwen_dist.config import LoraOptions
from qwen_dist.errors import UsageError
from qwen_dist.hf_config import read_model_config
from qwen_dist.mesh import MeshConfig, default_mesh, make_mesh, training_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import random_parameters, with_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.runtime.backend import check_dtype
from qwen_dist.sharding import RULE_SETS, RuleSet, ShardingContext, use_sharding
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.lora import extract_adapter, new_adapter
from qwen_dist.train.step import REMAT_POLICIES, batch_loss

Parameters = Mapping[str, jax.Array]


def load_model(
    model: str | os.PathLike[str],
    mesh: str | jax.sharding.Mesh = "",
    rules: Literal["train", "inference"] | RuleSet = "train",
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16",
    *,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    ignored_config_keys: Iterable[str] = (),
    progress: ProgressCallback | None = None,
) -> CausalLM:
    """Load a model onto a mesh: every process reads only the bytes of its devices, straight into sharded arrays.

    Args:
      model: a directory in the Hugging Face format, a hub id such as `Qwen/Qwen3-0.6B`, or an address.
      mesh: devices per axis, such as `fsdp=2,tensor=4`, or a mesh of jax with any axes that the rules name; empty chooses.
      rules: the mesh axes of each logical axis: those of training or of inference, or your own rule set.
      dtype: of parameters and computation.
      load_format: "dummy" makes random weights and reads none.
      ignored_config_keys: unknown keys of the checkpoint's JSON files that do not change the computation.
      progress: called with bytes read and bytes in all.

    Raises:
      UserError: the model cannot be loaded, or does not fit the mesh; the message lists every reason.
    """
    check_dtype(dtype)
    files = ModelFiles.open(model)
    loaded = load(
        files,
        _sharding_ctx(read_model_config(files, ignored_config_keys), mesh, rules),
        dtype=dtype,
        load_format=load_format,
        ignored_config_keys=ignored_config_keys,
        progress=progress,
    )
    return CausalLM(loaded)


def new_model(
    config: ModelConfig,
    mesh: str | jax.sharding.Mesh = "",
    rules: Literal["train", "inference"] | RuleSet = "train",
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16",
    *,
    seed: int = 0,
) -> CausalLM:
    """Make a model with random parameters, the same on every mesh. Other arguments and errors as for `load_model`."""
    check_dtype(dtype)
    sharding_ctx, module = _sharding_ctx(config, mesh, rules), Transformer(config, dtype=dtype)
    return CausalLM(LoadedModel(config, module, random_parameters(module, sharding_ctx, seed), sharding_ctx))


def _sharding_ctx(
    config: ModelConfig, mesh: str | jax.sharding.Mesh, rules: Literal["train", "inference"] | RuleSet
) -> ShardingContext:
    rule_set = RULE_SETS[rules] if isinstance(rules, str) else rules
    if isinstance(mesh, str):
        choose = training_mesh if rule_set.phase == "train" else default_mesh
        mesh = make_mesh(MeshConfig.parse(mesh) if mesh else choose(config, jax.devices()))
    return ShardingContext(mesh, rule_set)


class CausalLM:
    """A model and its parameters. Its functions take the parameters as an argument, for `jax.jit` and `jax.grad`.

    Attributes:
      parameters: sharded arrays by the checkpoint's names; a dict, so optax takes it.
    """

    def __init__(self, loaded: LoadedModel, lora: LoraOptions | None = None):
        self._loaded, self._lora = loaded, lora
        self._logits = jax.jit(self.logits)
        self.parameters: dict[str, jax.Array] = loaded.parameters

    @property
    def config(self) -> ModelConfig:
        """The architecture, from config.json."""
        return self._loaded.config

    @property
    def sharding_ctx(self) -> ShardingContext:
        """Mesh and rules; enter `use_sharding(model.sharding_ctx)` around gradients that are not taken by this class."""
        return self._loaded.sharding_ctx

    def module(self, parameters: Parameters | None = None) -> Transformer:
        """Return the Flax module with these parameters, by default its own, in it."""
        return with_parameters(self._loaded.module, self.parameters if parameters is None else parameters)

    def __call__(self, tokens_BT: Any, positions_BT: Any = None, segments_BT: Any = None) -> jax.Array:
        """Return the next token's logits [B, T, V] with the model's own parameters, compiled. Arguments as `logits`."""
        return self._logits(self.parameters, tokens_BT, positions_BT, segments_BT)

    def logits(
        self, parameters: Parameters, tokens_BT: Any, positions_BT: Any = None, segments_BT: Any = None
    ) -> jax.Array:
        """Return the next token's logits [B, T, V], in at least float32.

        Args:
          parameters: as `self.parameters`.
          tokens_BT: token ids.
          positions_BT: of each token in its sequence; negative for padding. Default: 0, 1, 2, … in each row.
          segments_BT: the number of each token's sequence, where a row has several.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        with use_sharding(self.sharding_ctx):
            module = self.module(parameters)
            x_BTD, _, _ = module(tokens_BT, jnp.asarray(positions_BT), segments_BT=segments_BT)
            return module.unembed(x_BTD)

    def loss(self, parameters: Parameters, batch: TrainBatch, remat: str = "none") -> jax.Array:
        """Return the mean cross-entropy of the batch's target tokens, with the auxiliary loss of a mixture of experts.

        Args:
          parameters: as `self.parameters`; computed in the model's dtype, whatever their own.
          batch: see `TrainBatch.from_sequences`.
          remat: what the backward pass recomputes: "none", "selective" (all but matrix products) or "full" (whole blocks).
        """
        rounded = {name: value.astype(self._loaded.dtype) for name, value in parameters.items()}
        with use_sharding(self.sharding_ctx):
            loss, count, aux_loss = batch_loss(self.module(rounded), batch, self.sharding_ctx, REMAT_POLICIES[remat])
        return loss / jnp.maximum(count, 1) + aux_loss

    def loss_and_gradient(
        self, trained: Parameters, batch: TrainBatch, frozen: Parameters | None = None, remat: str = "none"
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss and its gradient for the `trained` parameters; `frozen` are the others. For use in `jax.jit`."""

        def loss(trained: Parameters) -> jax.Array:
            return self.loss({**(frozen or {}), **trained}, batch, remat)

        with use_sharding(self.sharding_ctx):  # the backward pass is traced after `loss` has returned
            return jax.value_and_grad(loss)(dict(trained))

    def shard(self, batch: TrainBatch) -> TrainBatch:
        """Copy a batch of host arrays to the devices. Every process gives all rows, and copies those of its devices."""

        def put(rows: np.ndarray) -> jax.Array:
            sharding = self.sharding_ctx.activation("batch", rows.shape, ("batch", "length"))
            return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

        return jax.tree.map(put, batch)

    def with_lora(self, options: LoraOptions | None = None) -> tuple[CausalLM, list[str]]:
        """Return the model with new adapters, which do not change its outputs yet, and the names of their parameters.

        Raises:
          UsageError: a target matches no layer.
        """
        options = options or LoraOptions()
        copy = dataclasses.replace(self._loaded, module=nnx.clone(self._loaded.module), parameters=self.parameters)
        loaded, trained = new_adapter(copy, options, dtype=accum_dtype(self._loaded.dtype))
        return CausalLM(loaded, options), trained

    def save_pretrained(self, directory: str | os.PathLike[str], parameters: Parameters | None = None) -> None:
        """Write these parameters, by default the model's own, for `transformers` and `peft`.

        A model with adapters writes the adapter, in PEFT's layout; any other the whole model with tokenizer and
        configuration, replacing one that is there.

        Raises:
          CheckpointError: the directory cannot be written, or is something else.
          UsageError: the model is new, so there is no configuration to write.
        """
        if self._loaded.files is None:
            raise UsageError("a new model has no config.json and no tokenizer; save its parameters, such as with orbax")
        parameters = dict(self.parameters if parameters is None else parameters)
        if self._lora is None:
            save_model(self._loaded, parameters, directory, dtype=self._loaded.dtype, overwrite=True)
            return
        from qwen_dist.checkpoint.adapter import write_adapter

        trained = {name: value for name, value in parameters.items() if ".lora_" in name}
        adapter = extract_adapter(trained, self._lora, self._loaded)
        write_adapter(directory, adapter, base=str(self._loaded.files))
