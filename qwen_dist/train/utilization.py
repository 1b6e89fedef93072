"""Model flops utilization (MFU, arXiv:2204.02311): the flops a step needs, divided by the peak of the devices."""

from __future__ import annotations

from collections.abc import Collection

import jax
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.adapter_layers import linear_layers
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.transformer import layer_cost
from qwen_dist.ops.cost import Step
from qwen_dist.planning.chips import chip_of_device


def peak_flops_per_second(devices: Collection[jax.Device], dtype: DTypeLike) -> float | None:
    """Return the peak of all devices together for matrix products in this dtype; None where it is not known."""
    chip = chip_of_device(next(iter(devices)).device_kind)
    if chip is None or chip.flops_per_second is None or jax.numpy.dtype(dtype) != jax.numpy.bfloat16:
        return None
    return len(devices) * chip.flops_per_second


class StepFlops:
    """The flops of a forward and backward pass, without recomputation, as in the paper.

    A product with a weight takes 2 flops per weight and token, the gradient of its input 2 more, and that of a trained
    weight another 2. What layers take besides they say themselves (`ops.cost`); of attention the visible keys count.
    """

    def __init__(self, model: LoadedModel, trained: Collection[str]):
        self._model, self._trains_weights = model, any(".lora_" not in name for name in trained)
        head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
        products = [*(f"{name}.weight" for name, _ in linear_layers(model.module)), f"{head}.weight"]
        sizes = model.num_elements()
        self._flops_per_token = sum((4 + 2 * (name in trained)) * sizes[name] for name in products)

    def __call__(self, positions_BT: np.ndarray) -> float:
        """Return the flops of a step on tokens at these positions of their sequences; -1 is padding."""
        num_visible = positions_BT[positions_BT >= 0].astype(np.float64) + 1
        num_tokens, flops = num_visible.size, 0.0
        for layer, block in zip(self._model.config.layers, self._model.module.layers, strict=True):
            num_keys = np.minimum(num_visible, layer.sliding_window or np.inf).sum() / max(num_tokens, 1)
            for part in (block.mixer, block.mlp):
                cost = layer_cost(part, self._row(positions_BT.shape[1], float(num_keys))).flops
                flops += cost.forward + cost.backward - cost.recompute
        return num_tokens * (self._flops_per_token + flops / positions_BT.shape[1])

    def _row(self, num_tokens: int, num_keys: float) -> Step:
        return Step(
            phase="train",
            num_rows=1,
            num_tokens=num_tokens,
            num_outputs=num_tokens,
            num_keys=num_keys,
            num_pages=0,
            dtype="bfloat16",  # no number of flops depends on it
            trains_weights=self._trains_weights,
        )
