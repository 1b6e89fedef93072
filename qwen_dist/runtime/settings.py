"""Settings of jax and its compilers for GPUs and TPUs, in one place: each with its reason and where that is from. No jax.

What the user has set stays. `qwen-dist doctor` prints the settings that a run would have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, MutableMapping
from typing import Literal

Kind = Literal["environment", "jax", "compiler"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      kind: a variable of the environment, a key of jax's configuration, or an option of the compiler of each program.
      name, value: as text.
      reason: why this value.
      source: where the reason is from.
      other_names: other variables that set the same, so that none of them may be set as well.
    """

    kind: Kind
    name: str
    value: str
    reason: str
    source: str
    other_names: tuple[str, ...] = ()


_GPU_TIPS = "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"

_MEMORY = Setting(
    "environment",
    "XLA_CLIENT_MEM_FRACTION",
    "0.9",
    "one process has the GPU: weights and cache may take 90 % of its memory; jax's default is 75 %",
    _GPU_TIPS,
    ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"),
)
_AUTOTUNING = Setting(
    "jax",
    "jax_persistent_cache_enable_xla_caches",
    "all",
    "choosing kernels for each matrix product takes minutes: the choices are cached beside the compiled programs",
    "https://docs.jax.dev/en/latest/persistent_compilation_cache.html",
)
_PRECISION = Setting(
    "jax",
    "jax_default_matmul_precision",
    "highest",
    "float32 products would be rounded to TF32 on a GPU and to bfloat16 on a TPU; float32 is asked for to be exact",
    "https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision",
)
_GPU_OVERLAP = Setting(
    "compiler",
    "xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "collectives run while something else is computed",
    _GPU_TIPS,
)


def expected_platform(environ: Mapping[str, str]) -> str:
    """Return the platform that jax is going to use, "cpu", "gpu" or "tpu", without starting it."""
    asked = [name.strip() for name in environ.get("JAX_PLATFORMS", "").lower().split(",") if name.strip()]
    if asked:
        return "gpu" if asked[0] in ("cuda", "gpu") else asked[0]
    if has_nvidia_gpu() and cuda_plugins():
        return "gpu"
    return "tpu" if has_tpu() and importlib.util.find_spec("libtpu") else "cpu"


def has_nvidia_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU with its driver, whatever jax can use."""
    return pathlib.Path("/dev/nvidiactl").exists() or pathlib.Path("/proc/driver/nvidia").exists()


def has_tpu() -> bool:
    """Return whether this machine has a TPU, whatever jax can use."""
    return any(any(pathlib.Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))


def cuda_plugins() -> tuple[str, ...]:
    """Return the installed packages that bring CUDA to jax."""
    return tuple(name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name))


def settings(platform: str, dtype: str) -> tuple[Setting, ...]:
    """Return the settings of environment and jax on a platform, for programs that compute in `dtype`."""
    precision = (_PRECISION,) if dtype == "float32" else ()
    return {"gpu": (_MEMORY, _AUTOTUNING, *precision), "tpu": precision}.get(platform, ())


def compiler_settings(platform: str, num_devices: int, phase: str) -> tuple[Setting, ...]:
    """Return the options of the compiler for the programs of a phase, "train" or "inference"."""
    return (_GPU_OVERLAP,) if platform == "gpu" and num_devices > 1 else ()


def compiler_options(platform: str, num_devices: int, phase: str) -> dict[str, bool] | None:
    """Return the same for `jax.jit`; None where there are none."""
    return {one.name: one.value == "true" for one in compiler_settings(platform, num_devices, phase)} or None


def set_environment(environ: MutableMapping[str, str], chosen: tuple[Setting, ...]) -> None:
    """Set the variables among the settings, but none that is set already, by this or another name."""
    for one in chosen:
        if one.kind == "environment" and not any(name in environ for name in (one.name, *one.other_names)):
            environ[one.name] = one.value


def is_overridden(one: Setting, environ: Mapping[str, str]) -> bool:
    """Return whether the user has set a setting of the environment or of jax."""
    names = (one.name.upper(),) if one.kind == "jax" else (one.name, *one.other_names)
    return any(name in environ and environ[name] != one.value for name in names)
