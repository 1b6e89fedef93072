"""Round the weights of a quantised model again, so that its outputs for a text change less (GPTQ).

Block after block: the inputs of the block's linear layers are those of the blocks before it as they are quantised. Only one
block's second moments are in memory.

Letters: B batch, T length, D embed, C in-features of a linear layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_dist.capture import observe_inputs
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.checkpoint.quantized import KeptWeight
from qwen_dist.errors import UserError
from qwen_dist.models.config import LayerConfig
from qwen_dist.models.layers import Linear
from qwen_dist.models.moe import Experts
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.rope import rope_table
from qwen_dist.models.state import MixerInputs
from qwen_dist.models.transformer import Block
from qwen_dist.ops.grouped_weight import SCALE, GroupedFormat
from qwen_dist.ops.matmul import matmul
from qwen_dist.quantization.gptq import round_with_feedback
from qwen_dist.sharding import use_sharding
from qwen_dist.text_sample import windows


def calibrate(
    model: LoadedModel,
    quantized: LoadedModel,
    tokens: Sequence[int],
    announce: Callable[[str], None] = lambda text: None,
) -> LoadedModel:
    """Return `quantized` with the weights of linear layers rounded again, for their outputs on a text.

    Scales stay as they are, and so does `down_proj` of experts, whose inputs are each expert's own.

    Args:
      model: the checkpoint without quantisation.
      quantized: the same checkpoint on the same mesh in int8 or int4.
      tokens: of the text.
      announce: gets a line for each layer.

    Raises:
      UserError: the model computes infinite values or NaN for the text.
    """
    parameters = dict(quantized.parameters)
    before, after = _Blocks(model, model.parameters), _Blocks(quantized, parameters)
    batches = list(windows(tokens, model.sharding_ctx.batch_multiple()))
    hidden = before.embed([tokens_BT for tokens_BT, _ in batches])
    kept = {one.weight.name: one for one in quantized.kept}
    num_layers = len(model.config.layers)
    for index in range(num_layers):
        moments: dict[str, jax.Array] = {}
        for x_BTD, (_, positions_BT) in zip(hidden, batches, strict=True):
            for in_block, moments_CC in before.run(_moments, index, x_BTD, positions_BT).items():
                name = f"layers.{index}.{in_block}"
                moments[name] = moments[name] + moments_CC if name in moments else moments_CC
        for name in sorted(kept.keys() & moments.keys()):
            if not jnp.isfinite(jnp.trace(moments[name])):
                raise UserError(f"--calibration: the inputs of {name} are not finite for this text; use --dtype float32")
            parameters[name] = _round(kept[name], model.parameters[name], moments.pop(name), parameters)
        hidden = [
            after.run(_output, index, x_BTD, positions_BT) for x_BTD, (_, positions_BT) in zip(hidden, batches, strict=True)
        ]
        announce(f"rounded layer {index + 1} of {num_layers}")
    return dataclasses.replace(quantized, parameters=parameters)


class _Blocks:
    """Runs the blocks of a model one by one, with one program for all that are equal."""

    def __init__(self, model: LoadedModel, parameters: Mapping[str, jax.Array]):
        self._model, self._parameters = model, parameters
        self._programs: dict[tuple[Any, LayerConfig], Any] = {}

    def embed(self, batches: Sequence[np.ndarray]) -> list[jax.Array]:
        """Return the embeddings [B, T, D] of tokens [B, T]."""
        model = self._model

        @jax.jit
        def run(parameters: Mapping[str, jax.Array], tokens_BT: jax.Array) -> jax.Array:
            with use_sharding(model.sharding_ctx):
                return with_parameters(model.module, parameters).embed_tokens(tokens_BT)

        return [run(self._parameters, tokens_BT) for tokens_BT in batches]

    def run(self, function: Any, index: int, x_BTD: jax.Array, positions_BT: np.ndarray) -> Any:
        """Return `function(block, x, inputs of the mixer)`, compiled."""
        model, prefix = self._model, f"layers.{index}."
        config, layer = model.config, model.config.layers[index]
        block = model.module.layers[index]

        def call(parameters: Mapping[str, jax.Array], x_BTD: jax.Array, positions_BT: jax.Array) -> Any:
            with use_sharding(model.sharding_ctx):
                rope = rope_table(config.rope, config.rotary_dim, positions_BT, x_BTD.dtype)
                return function(with_parameters(block, parameters), x_BTD, MixerInputs(rope, positions_BT))

        program = self._programs.setdefault((function, layer), jax.jit(call))
        of_block = {name[len(prefix) :]: x for name, x in self._parameters.items() if name.startswith(prefix)}
        return program(of_block, x_BTD, positions_BT)


def _output(block: Block, x_BTD: jax.Array, inputs: MixerInputs) -> jax.Array:
    return block(x_BTD, inputs, None)[0]


def _moments(block: Block, x_BTD: jax.Array, inputs: MixerInputs) -> dict[str, jax.Array]:
    """Return X^T X [C, C] in float32 of the inputs of each linear layer, by the name of its weight in the block.

    Those of experts' `gate_up_proj` are of all tokens, whichever experts they go to.
    """
    names = {}
    for path, layer in nnx.iter_modules(block):
        if isinstance(layer, Linear | Experts):
            names[id(layer)] = ".".join([*map(str, path), "weight" if isinstance(layer, Linear) else "gate_up_proj"])
    moments = {}

    def observe(layer: Any, rows_BTC: jax.Array) -> None:
        is_real_BT1 = inputs.positions_BT[..., None] >= 0
        columns_CN = jnp.where(is_real_BT1, rows_BTC, 0).reshape(-1, rows_BTC.shape[-1]).T
        moments[names[id(layer)]] = matmul(columns_CN, columns_CN, jnp.float32)

    with observe_inputs(observe):
        block(x_BTD, inputs, None)
    return moments


def _round(kept: KeptWeight, weight: jax.Array, moments_CC: jax.Array, parameters: Mapping[str, jax.Array]) -> jax.Array:
    values, scale = parameters[kept.weight.name], parameters[kept.weight.name + SCALE]
    return _rounding(kept.form, values.sharding)(weight, moments_CC, scale)


@functools.lru_cache
def _rounding(form: GroupedFormat, sharding: jax.sharding.Sharding) -> Any:
    def run(weight: jax.Array, moments_CC: jax.Array, scale: jax.Array) -> jax.Array:
        weight_OC, scale_OG = weight.reshape(-1, form.in_features), scale.reshape(-1, form.num_groups)
        values = round_with_feedback(weight_OC, moments_CC, scale_OG, form)
        return values.reshape(*scale.shape[:-2], *values.shape[1:])

    return jax.jit(run, out_shardings=sharding)
