"""Model flops utilization (MFU, arXiv:2204.02311): the flops a step needs, divided by the peak of the devices."""

from __future__ import annotations

import collections
from collections.abc import Collection

import jax
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.planning.chips import chip_of_device
from qwen_dist.planning.flops import active_weights, mixing_flops


def peak_flops_per_second(devices: Collection[jax.Device], dtype: DTypeLike) -> float | None:
    """Return the peak of all devices together for matrix products in this dtype; None where it is not known."""
    chip = chip_of_device(next(iter(devices)).device_kind)
    if chip is None or chip.flops_per_second is None or jax.numpy.dtype(dtype) != jax.numpy.bfloat16:
        return None
    return len(devices) * chip.flops_per_second


class StepFlops:
    """The flops of the products in a forward and backward pass, without recomputation, as in the paper.

    A product with a weight takes 2 flops per weight and token, the gradient of its input 2 more, and that of a trained
    weight another 2. What mixers take besides is in `planning.flops`; of attention the visible keys count.
    """

    def __init__(self, model: LoadedModel, trained: Collection[str]):
        active = active_weights(model.config, disk_shapes(model.module))
        self._flops_per_token = 4 * sum(active.values()) + 2 * sum(active[name] for name in active.keys() & set(trained))
        self._config, self._layers = model.config, collections.Counter(model.config.layers)

    def __call__(self, positions_BT: np.ndarray) -> float:
        """Return the flops of a step on tokens at these positions of their sequences; -1 is padding."""
        num_visible = positions_BT[positions_BT >= 0].astype(np.float64) + 1
        flops = num_visible.size * self._flops_per_token
        for layer, count in self._layers.items():
            mixing = mixing_flops(self._config, layer, positions_BT.shape[1])
            num_keys = np.minimum(num_visible, layer.sliding_window or np.inf).sum()
            flops += count * (num_visible.size * (mixing.forward + mixing.backward) + num_keys * 3 * mixing.per_key)
        return flops
