"""Model flops utilisation (arXiv:2204.02311): the arithmetic that a step needs, beside what the devices could do."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.planning.chips import chip_of_device


def flops_per_second(devices: Collection[jax.Device], dtype: DTypeLike) -> float | None:
    """What the devices together can do in products of this type; None where the data sheet is not known."""
    chip = chip_of_device(next(iter(devices)).device_kind)
    if chip is None or chip.flops_per_second is None or jax.numpy.dtype(dtype) != jax.numpy.bfloat16:
        return None
    return len(devices) * chip.flops_per_second


class StepFlops:
    """What forward and backward pass need, whatever is computed again: products only, as in the paper.

    A product takes 2 flops for a weight and token, the gradient of its input as much, and that of a trained weight as much
    again. Attention takes 4 for an element of a query and each key that it sees, and twice that backwards.
    """

    def __init__(self, model: LoadedModel, trained: Collection[str]):
        config = model.config
        used, changed = 0.0, 0.0
        for name, shape in disk_shapes(model.module).items():
            is_looked_up = name == "embed_tokens.weight" and not config.tie_word_embeddings
            if len(shape) < 2 or is_looked_up:
                continue
            share = config.moe.experts_per_token / config.moe.num_experts if config.moe and ".experts." in name else 1.0
            used += share * math.prod(shape)
            changed += share * math.prod(shape) * (name in trained)
        self._of_token = 4 * used + 2 * changed
        self._of_key = 12 * config.num_attention_heads * config.head_dim
        self._windows = [layer.sliding_window for layer in config.layers]

    def __call__(self, positions_BT: np.ndarray) -> float:
        """Of a step on tokens at these positions of their sequences; -1 is padding."""
        num_seen = positions_BT[positions_BT >= 0].astype(np.float64) + 1
        num_keys = sum(np.minimum(num_seen, window or np.inf).sum() for window in self._windows)
        return num_seen.size * self._of_token + num_keys * self._of_key
