"""Lower programs for devices that this machine does not have, with the kernels of their backend."""

import contextlib
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from qwen_dist.ops import dispatch, gpu
from qwen_dist.ops.dispatch import Backend

BACKENDS = {"cuda": Backend.GPU, "tpu": Backend.TPU}
H100 = gpu.GPUFeatures(gpu.HOPPER, 91_000, has_triton=True)
# The custom calls of kernels, by how their names begin.
_CALLS = re.compile(r"custom_call @([\w.$]+)\(")
_NAMES = {"__cudnn$fmhaSoftmax": "cudnn", "__gpu$xla.gpu.triton": "triton", "tpu_custom_call": "mosaic"}


@contextlib.contextmanager
def devices_of(platform: str):
    """Choose implementations as on this platform, a GPU being an H100 with cuDNN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "active_backend", lambda: BACKENDS[platform])
        if platform == "cuda":
            patch.setattr(gpu, "gpu_features", lambda: H100)
            # jax asks the GPU that it finds.
            patch.setattr(cudnn, "check_cudnn_version", lambda: H100.cudnn_version)
            patch.setattr(cudnn, "check_compute_capability", lambda capability: True)
            patch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
            with contextlib.suppress(ImportError):  # before 0.12 jax assumes an H100
                from jax._src.pallas.triton import gpu_info

                h100 = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H100)
                patch.setattr(gpu_info, "get_gpu_info", lambda: h100)
        yield


def lowered_text(platform: str, function, *arguments, **options) -> str:
    """Return the program of a jitted function for this platform; the arguments may be abstract."""
    traced = function.trace(*arguments, **options)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels_in(text: str) -> set[str]:
    """Return the kinds of kernels that a lowered program calls."""
    calls = set(_CALLS.findall(text))
    return {kind for name, kind in _NAMES.items() if any(call.startswith(name) for call in calls)}


def abstract(tree):
    """Return the shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
