"""The decoder: one forward for training, prefill and decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.models.attention import Attention
from qwen_dist.models.cache import Cache, LayerCache, Pages
from qwen_dist.models.capture import is_capturing, scope, tap
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Embedding, Linear, RMSNorm, matmul, take_positions
from qwen_dist.models.mlp import MLP
from qwen_dist.models.moe import MoE
from qwen_dist.models.rope import rope_table
from qwen_dist.sharding import all_gather_weight, constrain, prefetch_barrier

# A policy of `jax.checkpoint`, such as `jax.checkpoint_policies.nothing_saveable`.
Remat = Callable[..., bool]


class Block(nnx.Module):
    """Attention and MLP (or a mixture of experts), each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: DTypeLike):
        norm = functools.partial(RMSNorm, "embed", config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, dtype=dtype)
        self.post_attention_layernorm = norm()
        sizes = config.hidden_size, config.intermediate_size
        is_mixture = layer.ffn == "moe"
        self.mlp = MoE(config, dtype=dtype) if is_mixture else MLP(*sizes, dtype=dtype, std=config.initializer_range)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions_BT: jax.Array,
        cache: LayerCache | None,
        pages: Pages | None,
        segments_BT: jax.Array | None,
        only_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """What comes out for each token, or with a cache and `only_B` for the one of each row with that index."""
        normed_BTD = tap("input_layernorm", self.input_layernorm(x_BTD))
        with scope("self_attn"):
            mixed_BTD, cache = self.self_attn(normed_BTD, rope, positions_BT, cache, pages, segments_BT, only_B)
        if only_B is not None:
            x_BTD, positions_BT = take_positions(x_BTD, only_B), take_positions(positions_BT, only_B, -1)
        x_BTD = constrain(tap("residual", x_BTD + mixed_BTD), "batch", "length", "embed")
        normed_BTD = tap("post_attention_layernorm", self.post_attention_layernorm(x_BTD))
        with scope("mlp"):
            if isinstance(self.mlp, MLP):
                out_BTD, router_logits_BTE = self.mlp(normed_BTD), None
            else:
                out_BTD, router_logits_BTE = self.mlp(normed_BTD, positions_BT >= 0)
        return constrain(x_BTD + out_BTD, "batch", "length", "embed"), cache, router_logits_BTE


class Transformer(nnx.Module):
    """A Qwen text model whose parameters carry the checkpoint's names (without its prefix) and bytes."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        std = config.initializer_range
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, std=std)
        self.layers = nnx.List([Block(config, layer, dtype=dtype) for layer in config.layers])
        self.norm = RMSNorm("embed", config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        vocab, embed = {"vocab": config.vocab_size}, {"embed": config.hidden_size}
        is_tied = config.tie_word_embeddings
        self.lm_head = None if is_tied else Linear(vocab, embed, bias=False, dtype=dtype, std=std)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | None = None,
        pages: Sequence[Pages] | None = None,
        *,
        segments_BT: jax.Array | None = None,
        remat: Remat | None = None,
        only_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, tuple[jax.Array, ...]]:
        """Run tokens through every block.

        Returns the normalised hidden states [B, T, D], the cache, and the router's logits [B, T, E] of every mixture of
        experts, of which `moe.load_balancing_loss` is a function.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: each token's position in its sequence, int32; negative for padding, which nothing sees and which may
            stand on either side.
          cache: keys and values of earlier positions (see `cache.empty`); these tokens' are added.
          pages: with a cache, where in it these tokens go and what they look at, for each of `config.windows`. A row may be
            a part of a sequence, and several rows parts of one.
          segments_BT: without a cache: where a row holds several sequences, one after the other, the number of the one that
            each token is of. Positions begin at 0 in each of them, and none sees another.
          remat: what the forward pass keeps of each block for the backward pass, which computes the rest again: a policy of
            `jax.checkpoint`; everything when None.
          only_B: with a cache: the index of the one token of each row whose hidden state is wanted, [B, 1, D], negative for
            none. Of the others the last block makes keys and values only.
        """
        x_BTD = constrain(tap("embed_tokens", self.embed_tokens(tokens_BT)), "batch", "length", "embed")
        rope = rope_table(self.config.rope, self.config.head_dim, positions_BT, x_BTD.dtype)
        caches = (None,) * len(self.layers) if cache is None else cache
        windows = self.config.windows
        by_window = dict.fromkeys(windows) if pages is None else dict(zip(windows, pages, strict=True))
        updated: list[Any] = []
        router_logits: list[jax.Array] = []
        of_block: Any = Block.__call__ if remat is None else jax.checkpoint(Block.__call__, policy=remat)
        run = of_block
        if cache is not None and not is_capturing():
            # Traced once for all blocks that are alike, under the rules of this trace and no other.
            run = jax.jit(lambda *operands: of_block(*operands))
        for index, (block, layer, layer_cache) in enumerate(zip(self.layers, self.config.layers, caches, strict=True)):
            is_last = index == len(self.layers) - 1
            with scope(f"layers.{index}"):
                of_kind = by_window[layer.sliding_window]
                block = prefetch_barrier(x_BTD, block)
                operands = (block, x_BTD, rope, positions_BT, layer_cache, of_kind, segments_BT)
                x_BTD, layer_cache, of_router = run(*operands, only_B if is_last else None)
                x_BTD = tap("output", x_BTD)
                updated.append(layer_cache)
                router_logits += [] if of_router is None else [of_router]
        return tap("norm", self.norm(x_BTD)), None if cache is None else tuple(updated), tuple(router_logits)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """The next token's logits [B, T, V] from hidden states, in at least float32."""
        return logits(x_BTD, self.head())

    def head(self) -> jax.Array:
        """The output weights [V, D], of which a tied model's are its embedding's, as activations are cut."""
        return all_gather_weight((self.lm_head or self.embed_tokens).weight[...], "vocab", "embed")


def logits(x_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Hidden states against the weight of every token: logits [B, T, V] in at least float32."""
    # Never rounded to the model's dtype: a bfloat16 logit has 3 digits, and the choice of token hangs on it.
    return constrain(tap("logits", matmul(x_BTD, head_VD)), "batch", "length", "vocab")
