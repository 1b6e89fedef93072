"""The decoder: one forward pass for training, prefill and decode.

Letters: B batch, T length, X tokens whose hidden states are wanted, D embed, V vocab, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.capture import is_capturing, scope, tap
from qwen_dist.models.attention import Attention
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.delta_net import GatedDeltaNet
from qwen_dist.models.layers import Embedding, Linear, RMSNorm, take_positions
from qwen_dist.models.mlp import MLP
from qwen_dist.models.moe import MoE
from qwen_dist.models.rope import rope_table
from qwen_dist.models.state import LayerState, MixerInputs, States, num_state_shards
from qwen_dist.models.state_spec import AttentionSpec, CacheDtype, LayerStateSpec, cache_groups
from qwen_dist.ops.cost import LayerCost, Step
from qwen_dist.ops.gradient_order import adapter_gradients_first, has_adapters
from qwen_dist.ops.matmul import matmul
from qwen_dist.ops.step_rows import StepIndices, StepRows, join_groups, logit_indices, row_groups
from qwen_dist.ops.weight import Weight
from qwen_dist.sharding import all_gather_weight, constrain, prefetch_barrier

# A policy of `jax.checkpoint`, such as `jax.checkpoint_policies.nothing_saveable`.
Remat = Callable[..., bool]


class Mixer(Protocol):
    """A layer that mixes tokens of a sequence.

    `name` is the checkpoint's name of the submodule. Two attributes more are optional: `cost(step)`, see `layer_cost`, and
    `of_outputs`, the linear layers that compute only the tokens whose outputs are wanted, in the last layer.
    """

    name: str

    def __call__(
        self, x_BTD: jax.Array, inputs: MixerInputs, state: LayerState | None
    ) -> tuple[jax.Array, LayerState | None]: ...


# `LayerConfig.mixer` → (config, layer, dtype=…) → the mixer; the class also has `state_spec(config, layer, dtype)`.
MIXERS: dict[str, Any] = {"attention": Attention, "delta_net": GatedDeltaNet}


def state_specs(config: ModelConfig, dtype: DTypeLike, cache_dtype: CacheDtype | None = None) -> tuple[LayerStateSpec, ...]:
    """Return what each layer of a model that computes in `dtype` keeps between steps; keys and values in `cache_dtype`."""
    specs: list[LayerStateSpec] = [MIXERS[layer.mixer].state_spec(config, layer, dtype) for layer in config.layers]
    return tuple(dataclasses.replace(x, cache_dtype=cache_dtype) if isinstance(x, AttentionSpec) else x for x in specs)


class Block(nnx.Module):
    """A mixer and an MLP (or a mixture of experts), each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        norm = functools.partial(
            RMSNorm, "embed", config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset
        )
        self.input_layernorm = norm()
        self.mixer_name = MIXERS[layer.mixer].name
        setattr(self, self.mixer_name, MIXERS[layer.mixer](config, layer, dtype=dtype))
        self.post_attention_layernorm = norm()
        sizes = config.hidden_size, config.intermediate_size
        is_mixture = layer.ffn == "moe"
        self.mlp = MoE(config, dtype=dtype) if is_mixture else MLP(*sizes, dtype=dtype, std=config.initializer_range)

    @property
    def mixer(self) -> Mixer:
        return getattr(self, self.mixer_name)

    def __call__(
        self, x_BTD: jax.Array, inputs: MixerInputs, state: LayerState | None
    ) -> tuple[jax.Array, LayerState | None, jax.Array | None]:
        """Return the output for each token (with logit indices: for those), the state, and the router's logits."""
        positions_BT, index_BX = inputs.positions_BT, inputs.logit_indices_BX
        normed_BTD = tap("input_layernorm", self.input_layernorm(x_BTD))
        with scope(self.mixer_name):
            mixed_BTD, state = self.mixer(normed_BTD, inputs, state)
        if index_BX is not None:
            x_BTD, positions_BT = take_positions(x_BTD, index_BX), take_positions(positions_BT, index_BX, -1)
        x_BTD = constrain(tap("residual", x_BTD + mixed_BTD), "batch", "length", "embed")
        normed_BTD = tap("post_attention_layernorm", self.post_attention_layernorm(x_BTD))
        with scope("mlp"):
            if isinstance(self.mlp, MLP):
                out_BTD, router_logits_BTE = self.mlp(normed_BTD), None
            else:
                out_BTD, router_logits_BTE = self.mlp(normed_BTD, positions_BT >= 0)
        return constrain(x_BTD + out_BTD, "batch", "length", "embed"), state, router_logits_BTE


def layer_cost(layer: Any, step: Step) -> LayerCost:
    """Return what a mixer or an MLP says it takes; if it says nothing, the outputs of its linear layers."""
    if hasattr(layer, "cost"):
        return layer.cost(step)
    sizes = [dict(linear.out_sizes) for _, linear in nnx.iter_modules(layer) if isinstance(linear, Linear)]
    return LayerCost().with_more(step.itemsize * sum(step.tokens(**out) for out in sizes if out.keys() != {"embed"}))


class Transformer(nnx.Module):
    """A Qwen text model whose parameters have the checkpoint's names (without its prefix) and bytes."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        std = config.initializer_range
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, std=std)
        self.layers = nnx.List([Block(config, layer, dtype=dtype) for layer in config.layers])
        self.norm = RMSNorm("embed", config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)
        vocab, embed = {"vocab": config.vocab_size}, {"embed": config.hidden_size}
        is_tied = config.tie_word_embeddings
        self.lm_head = None if is_tied else Linear(vocab, embed, bias=False, dtype=dtype, std=std)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        states: States | None = None,
        indices: StepIndices | None = None,
        *,
        decode: StepRows | None = None,
        segments_BT: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> tuple[jax.Array, States | None, tuple[jax.Array, ...]]:
        """Run tokens through every block.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: each token's position in its sequence, int32; negative for padding, which nothing sees and which may
            be on either side.
          states: what each layer keeps of earlier positions (see `state.empty_states`); these tokens are added.
          indices: with states: where these tokens go in them. A row may be a chunk of a sequence, and several rows may
            belong to one.
          decode: with states: rows of one token of other sequences, which the same step computes, so that the weights are
            read once for all.
          segments_BT: without states: the number of each token's sequence, where a row has several, one after the other.
            Positions start at 0 in each of them, and none sees another.
          remat: which values of each block the forward pass keeps for the backward pass, which recomputes the others: a
            policy of `jax.checkpoint`; everything when None.

        Returns:
          The normalised hidden states [B, T, D], or of the tokens of `indices.logit_indices_BX` only [B, X, D]; the states;
          and the router's logits [B, T, E] of every mixture of experts, for `moe.load_balancing_loss`. With `decode`, the
          first dimension is that of the data-parallel shards, the second has the rows of `tokens_BT` and then the others.
        """
        steps = [] if indices is None else [StepRows(tokens_BT, positions_BT, indices)]
        if states is not None and decode is not None:
            steps.append(decode)
            num_shards = num_state_shards(states[0])
            tokens_BT = join_groups([one.tokens_BT for one in steps], num_shards)
            positions_BT = join_groups([one.positions_BT for one in steps], num_shards)
        x_BTD = constrain(tap("embed_tokens", self.embed_tokens(tokens_BT)), "batch", "length", "embed")
        rope = rope_table(self.config.rope, self.config.rotary_dim, positions_BT, x_BTD.dtype)
        inputs = _inputs_by_layer(self.config, MixerInputs(rope, positions_BT, segments_BT), steps, x_BTD.dtype)
        run: Any = Block.__call__ if remat is None else jax.checkpoint(_new_function(Block.__call__), policy=remat)
        if states is not None and not is_capturing():
            run = jax.jit(_new_function(run))
        first_adapter = next((index for index, block in enumerate(self.layers) if has_adapters(block)), len(self.layers))
        new_states, router_logits = list[LayerState](), list[jax.Array]()
        for index, block in enumerate(self.layers):
            with scope(f"layers.{index}"):
                block = prefetch_barrier(x_BTD, block)
                if states is None and index > first_adapter:
                    x_BTD, block = adapter_gradients_first(x_BTD, block)
                x_BTD, state, logits = run(block, x_BTD, inputs[index], None if states is None else states[index])
                x_BTD = tap("output", x_BTD)
            new_states.append(state)
            router_logits += [] if logits is None else [logits]
        return tap("norm", self.norm(x_BTD)), None if states is None else tuple(new_states), tuple(router_logits)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return the next token's logits [B, T, V] from hidden states, in at least float32."""
        return logits(x_BTD, self.head())

    def head(self) -> Weight:
        """Return the output weights [V, D], sharded as activations are; a tied model's are its embedding's."""
        return all_gather_weight((self.lm_head or self.embed_tokens).weight.get_value(), "vocab", "embed")


def _new_function(run: Any) -> Any:
    """Return a new function: jax traces it once for all blocks that are alike, and not under the rules of another trace."""
    return lambda *operands: run(*operands)


def _inputs_by_layer(
    config: ModelConfig, shared: MixerInputs, steps: Sequence[StepRows], dtype: DTypeLike
) -> list[MixerInputs]:
    """Give each layer the pages of its cache group; only the last layer may leave out tokens that nobody asked for."""
    if not steps:
        return [shared] * len(config.layers)
    num_shards = len(shared.positions_BT)  # with several groups of rows; with one, nothing is joined
    inputs = [shared._replace(groups=row_groups(steps, None, num_shards)[0])] * len(config.layers)
    for number, cache_group in enumerate(cache_groups(state_specs(config, dtype))):
        groups, page_BT = row_groups(steps, number, num_shards)
        for layer in cache_group.layers:
            inputs[layer] = shared._replace(groups=groups, page_BT=page_BT)
    inputs[-1] = inputs[-1]._replace(logit_indices_BX=logit_indices(steps, num_shards))
    return inputs


def logits(x_BTD: jax.Array, head_VD: Weight) -> jax.Array:
    """Return logits [B, T, V], always in at least float32: a bfloat16 has 3 digits, too few to choose between tokens."""
    return constrain(tap("logits", matmul(x_BTD, head_VD)), "batch", "length", "vocab")
