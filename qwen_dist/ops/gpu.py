"""What the GPUs of this process can do, for the predicates of their kernels."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re

import jax

# Tensor cores multiply bfloat16 from Ampere on; cuDNN's attention takes heads of more than 128 from Hopper on.
AMPERE, HOPPER = (8, 0), (9, 0)
# The first cuDNN with both passes of attention for the heads and masks of these models.
MIN_CUDNN = 90_500


@dataclasses.dataclass(frozen=True)
class GPUFeatures:
    """Of NVIDIA GPUs.

    Attributes:
      compute_capability: that of the oldest GPU, such as (9, 0).
      cudnn_version: as cuDNN gives it, such as 91002 for 9.10.2; 0 without cuDNN.
      has_triton: whether this jax compiles Pallas kernels with Triton.
    """

    compute_capability: tuple[int, int]
    cudnn_version: int
    has_triton: bool

    @property
    def can_run_triton(self) -> bool:
        return self.has_triton and self.compute_capability >= AMPERE

    @property
    def max_cudnn_head_dim(self) -> int:
        """The largest head that cuDNN's attention takes; 0 without it."""
        if self.cudnn_version < MIN_CUDNN or self.compute_capability < AMPERE:
            return 0
        return 256 if self.compute_capability >= HOPPER else 128


NO_GPU = GPUFeatures((0, 0), 0, False)


@functools.cache
def gpu_features() -> GPUFeatures:
    """Return what the NVIDIA GPUs of this process can do; `NO_GPU` where there are none, or others."""
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return NO_GPU
    found = [re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability)) for device in devices]
    capabilities = [(int(match[1]), int(match[2])) for match in found if match]
    if len(capabilities) < len(devices):
        return NO_GPU  # ROCm names architectures
    has_triton = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    return GPUFeatures(min(capabilities), _cudnn_version(), has_triton)


def _cudnn_version() -> int:
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

    try:
        return check_cudnn_version()
    except RuntimeError:
        return 0
