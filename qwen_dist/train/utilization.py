"""Model flops utilization (MFU, arXiv:2204.02311): the flops a step needs, divided by the peak of the devices."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.planning.chips import chip_of_device


def peak_flops_per_second(devices: Collection[jax.Device], dtype: DTypeLike) -> float | None:
    """Return the peak of all devices together for matrix products in this dtype; None where it is not known."""
    chip = chip_of_device(next(iter(devices)).device_kind)
    if chip is None or chip.flops_per_second is None or jax.numpy.dtype(dtype) != jax.numpy.bfloat16:
        return None
    return len(devices) * chip.flops_per_second


class StepFlops:
    """The flops of the matrix products in a forward and backward pass, without recomputation, as in the paper.

    A product takes 2 flops per weight and token, the gradient of its input 2 more, and that of a trained weight another 2.
    Attention takes 4 flops per query element and visible key, and twice that in the backward pass.
    """

    def __init__(self, model: LoadedModel, trained: Collection[str]):
        config = model.config
        num_active, num_trained = 0.0, 0.0
        for name, shape in disk_shapes(model.module).items():
            is_looked_up = name == "embed_tokens.weight" and not config.tie_word_embeddings
            if len(shape) < 2 or is_looked_up:
                continue
            active = config.moe.experts_per_token / config.moe.num_experts if config.moe and ".experts." in name else 1.0
            num_active += active * math.prod(shape)
            num_trained += active * math.prod(shape) * (name in trained)
        self._flops_per_token = 4 * num_active + 2 * num_trained
        self._flops_per_key = 12 * config.num_attention_heads * config.head_dim
        self._windows = [layer.sliding_window for layer in config.layers]

    def __call__(self, positions_BT: np.ndarray) -> float:
        """Return the flops of a step on tokens at these positions of their sequences; -1 is padding."""
        num_visible = positions_BT[positions_BT >= 0].astype(np.float64) + 1
        num_keys = sum(np.minimum(num_visible, window or np.inf).sum() for window in self._windows)
        return num_visible.size * self._flops_per_token + num_keys * self._flops_per_key
