"""This project's side: the model as the engine and the trainer run it, with its intermediates captured."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.capture import capture
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.moe import load_balancing_loss
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.state import States, empty_states
from qwen_dist.models.state_spec import cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import pages_for
from qwen_dist.ops.step_rows import indices_in_order
from qwen_dist.parity.inputs import Inputs
from qwen_dist.parity.tolerances import is_state
from qwen_dist.sharding import TRAIN, ShardingContext, use_sharding

_BLOCK_WEIGHTS = re.compile(r"(.*)\.queries_(\d+)\.weights$")


class Candidate:
    """A loaded model with the interface of `reference.Reference`."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded

    def forward(
        self, inputs: Inputs, columns: np.ndarray, replacing: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, jax.Array | np.ndarray]:
        """Return every intermediate at these columns of [B, T], and the logits.

        With `replacing`, each component gets these values as inputs instead of the results of the components before it, so
        every difference is the component's own.
        """
        tokens, positions = self._padded(inputs)

        def run(parameters: Mapping[str, jax.Array], replacing: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            with use_sharding(self.loaded.sharding_ctx), capture(replacing) as taps:
                model = with_parameters(self.loaded.module, parameters)
                hidden_BTD, *_ = model(tokens, positions)
                model.unembed(hidden_BTD[:, columns])
            return {name: _at_columns(name, value, columns)[: len(inputs.tokens)] for name, value in taps.items()}

        padded = {name: self._with_padding_rows(value, 0) for name, value in (replacing or {}).items()}
        return _with_whole_weights(jax.jit(run)(self.loaded.parameters, padded), inputs.tokens.shape[1], columns)

    def decode(self, inputs: Inputs, continuation: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute the logits before each token of `continuation` [B, steps] in two ways.

        Returns:
          The logits [B, steps, V] of chunked prefill (`chunk` tokens each) and decoding with the cache, and those of one
          forward pass over everything without a cache.
        """
        num_steps = continuation.shape[1]
        cached = self._decode_with_cache(inputs, continuation, chunk)
        whole = Inputs.from_rows([a + b.tolist() for a, b in zip(inputs.rows(), continuation[:, :-1], strict=True)])
        tokens, positions = self._padded(whole)

        def run(parameters: Mapping[str, jax.Array]) -> jax.Array:
            with use_sharding(self.loaded.sharding_ctx):
                model = with_parameters(self.loaded.module, parameters)
                hidden_BTD, *_ = model(tokens, positions)
                return model.unembed(hidden_BTD[:, -num_steps:])

        return cached, np.asarray(jax.jit(run)(self.loaded.parameters))[: len(inputs.tokens)]

    def _decode_with_cache(self, inputs: Inputs, continuation: np.ndarray, chunk: int) -> np.ndarray:
        config, dtype = self.loaded.config, self.loaded.dtype
        num_rows, num_steps = continuation.shape
        longest = int(inputs.lengths.max())
        specs, num_shards = state_specs(config, dtype), self.loaded.sharding_ctx.batch_multiple()
        rows = len(self._with_padding_rows(inputs.lengths, 0)) // num_shards
        pages_per_row = pages_for(longest + num_steps)
        states = empty_states(specs, num_shards, [rows * pages_per_row] * len(cache_groups(specs)), rows)
        step = jax.jit(self._cached_step, static_argnames="pages_per_row")

        def feed(tokens: np.ndarray, positions: np.ndarray, last: np.ndarray) -> np.ndarray:
            nonlocal states
            padded = (self._with_padding_rows(x, y) for x, y in ((tokens, 0), (positions, -1), (last, 0)))
            scores, states = step(self.loaded.parameters, *padded, states, pages_per_row=pages_per_row)
            return np.asarray(scores)[:num_rows]

        logits = np.zeros((num_rows, num_steps, config.vocab_size), jnp.promote_types(dtype, jnp.float32))
        for start in range(0, longest, chunk):
            chunk_logits = feed(*_chunk_of(inputs, start, chunk))
            ends_here = (start < inputs.lengths) & (inputs.lengths <= start + chunk)
            logits[ends_here, 0] = chunk_logits[ends_here]
        for index in range(num_steps - 1):
            positions = (inputs.lengths[:, None] + index).astype(np.int32)
            logits[:, index + 1] = feed(continuation[:, index : index + 1], positions, np.zeros(num_rows, np.int32))
        return logits

    def _cached_step(
        self,
        parameters: Mapping[str, jax.Array],
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        logit_indices_B: jax.Array,
        states: States,
        *,
        pages_per_row: int,
    ) -> tuple[jax.Array, States]:
        """Return the logits [B, V] at one token of each row, and the states with all tokens in them."""
        with use_sharding(self.loaded.sharding_ctx):
            model = with_parameters(self.loaded.module, parameters)
            specs, num_shards = (
                state_specs(self.loaded.config, self.loaded.dtype),
                self.loaded.sharding_ctx.batch_multiple(),
            )
            indices = indices_in_order(len(cache_groups(specs)), positions_BT, num_shards, pages_per_row)
            indices = indices._replace(logit_indices_BX=logit_indices_B[:, None])
            hidden_B1D, states_after, _ = model(tokens_BT, positions_BT, states, indices)
            assert states_after is not None
            return model.unembed(hidden_B1D)[:, 0], states_after

    def gradient(self, inputs: Inputs) -> tuple[dict[str, float], dict[str, jax.Array]]:
        """Return the losses of `Reference.gradient` and the gradient of the first one, under the training rules."""
        sharding_ctx = ShardingContext(self.loaded.sharding_ctx.mesh, TRAIN)
        tokens, positions = self._padded(inputs, sharding_ctx)

        def loss(parameters: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            with use_sharding(sharding_ctx):
                model = with_parameters(self.loaded.module, parameters)
                hidden_BTD, _, router_logits = model(tokens, positions)
                log_probabilities_BTV = jax.nn.log_softmax(model.unembed(hidden_BTD))[:, :-1]
            picked_BT = jnp.take_along_axis(log_probabilities_BTV, tokens[:, 1:, None], axis=-1)[..., 0]
            is_predicted_BT = positions[:, 1:] > 0
            losses = {"loss": -jnp.where(is_predicted_BT, picked_BT, 0).sum() / is_predicted_BT.sum()}
            if (moe := self.loaded.config.moe) is not None:
                losses["aux_loss"] = load_balancing_loss(router_logits, moe.experts_per_token, positions >= 0)
                losses["loss"] += moe.aux_loss_coef * losses["aux_loss"]
            return losses["loss"], losses

        shardings = {name: value.sharding for name, value in self.loaded.parameters.items()}
        differentiate = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings, None))
        gradients, losses = differentiate(self.loaded.parameters)
        return {name: float(value) for name, value in losses.items()}, gradients

    def _padded(self, inputs: Inputs, sharding_ctx: ShardingContext | None = None) -> tuple[jax.Array, jax.Array]:
        tokens, positions = (
            self._with_padding_rows(x, y, sharding_ctx) for x, y in ((inputs.tokens, 0), (inputs.positions, -1))
        )
        return jnp.asarray(tokens), jnp.asarray(positions)

    def _with_padding_rows(self, rows: np.ndarray, value: int, sharding_ctx: ShardingContext | None = None) -> np.ndarray:
        """Append rows of padding until the mesh can split the batch."""
        missing = -len(rows) % (sharding_ctx or self.loaded.sharding_ctx).batch_multiple()
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), constant_values=value)


def _chunk_of(inputs: Inputs, start: int, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens and positions of one chunk [B, chunk], right-padded, and the index of each row's last token [B]."""
    tokens = np.zeros((len(inputs.tokens), chunk), np.int32)
    for row, ids in enumerate(inputs.rows()):
        chunk_ids = ids[start : start + chunk]
        tokens[row, : len(chunk_ids)] = chunk_ids
    count = np.clip(inputs.lengths - start, 0, chunk)
    positions = np.where(np.arange(chunk) < count[:, None], start + np.arange(chunk), -1)
    return tokens, positions.astype(np.int32), np.maximum(count - 1, 0).astype(np.int32)


def _at_columns(name: str, value: jax.Array, columns: np.ndarray) -> jax.Array:
    if name == "logits" or is_state(name):
        return value
    block = _BLOCK_WEIGHTS.match(name)
    if block is None:
        return value[:, columns]
    inside = columns - int(block[2])
    return value[:, :, inside[(inside >= 0) & (inside < value.shape[2])]]


def _with_whole_weights(
    taps: dict[str, jax.Array], num_keys: int, columns: np.ndarray
) -> dict[str, jax.Array | np.ndarray]:
    """Concatenate attention weights, which the model computes per block of queries, without the keys after the block."""
    whole: dict[str, jax.Array | np.ndarray] = {}
    for name, value in taps.items():
        block = _BLOCK_WEIGHTS.match(name)
        if block is None:
            whole[name] = value
            continue
        shape = (*value.shape[:2], len(columns), num_keys)
        weights = whole.setdefault(f"{block[1]}.weights", np.zeros(shape, value.dtype))
        first = int(np.searchsorted(columns, int(block[2])))
        weights[:, :, first : first + value.shape[2], : value.shape[3]] = value
    return whole
