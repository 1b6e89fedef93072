"""The flops of a model's layers: one table, for the plan and for the utilization in training.

A product with a weight takes 2 flops per weight and token. The table has the rest: what mixers multiply without weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.ops.delta_rule import chunk_size


class MixingFlops(NamedTuple):
    """The flops of a mixer's products without weights, for one token.

    Attributes:
      forward, backward: whatever the token's position.
      per_key: of the forward pass, for each key that the token sees; the backward pass takes twice that.
      in_scan: the part of `forward` that is in the loop over the chunks of a row.
    """

    forward: float = 0.0
    backward: float = 0.0
    per_key: float = 0.0
    in_scan: float = 0.0


def mixing_flops(config: ModelConfig, layer: LayerConfig, num_tokens: int) -> MixingFlops:
    """Return the flops of a layer's mixer for each token of rows of `num_tokens` tokens."""
    return _MIXERS[layer.mixer](config, num_tokens)


def active_weights(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Return how many weights of each matrix multiply one token.

    Args:
      config: of the model.
      shapes: of its parameters on disk, by name. Experts count as far as a token is routed to them. Vectors do not count,
        nor does an embedding that is only looked up.
    """
    active = {}
    for name, shape in shapes.items():
        is_looked_up = name == "embed_tokens.weight" and not config.tie_word_embeddings
        if len(shape) < 2 or is_looked_up:
            continue
        is_routed = config.moe is not None and ".experts." in name
        share = config.moe.experts_per_token / config.moe.num_experts if is_routed else 1.0  # type: ignore[union-attr]
        active[name] = share * math.prod(shape)
    return active


def _attention(config: ModelConfig, num_tokens: int) -> MixingFlops:
    return MixingFlops(per_key=4 * config.num_attention_heads * config.head_dim)


def _delta_net(config: ModelConfig, num_tokens: int) -> MixingFlops:
    """Count `ops.delta_rule`: for one token a step, for more their share of the products of a chunk of C tokens.

    The inverse takes 2 log₂ C products of [C, C] matrices, and its gradient 2; others take twice as many in the backward
    pass.
    """
    net = config.delta_net
    assert net is not None
    heads, K, V = net.num_key_heads * net.values_per_key, net.key_dim, net.value_dim
    if num_tokens == 1:
        # Two products with the state; then it is decayed, and an outer product is added.
        return MixingFlops(forward=heads * 7 * K * V)
    C = chunk_size(num_tokens)
    with_state = heads * 2 * (3 * K * V + C * V)
    of_chunk = net.num_key_heads * 2 * 2 * C * K + heads * 2 * (C * K + C * V)
    inverse, inverse_backward = heads * 2 * 2 * (C.bit_length() - 1) * C * C, heads * 2 * 2 * C * C
    forward = with_state + of_chunk + inverse
    return MixingFlops(forward, 2 * (with_state + of_chunk) + inverse_backward, in_scan=with_state)


_MIXERS: Mapping[str, Callable[[ModelConfig, int], MixingFlops]] = {"attention": _attention, "delta_net": _delta_net}
