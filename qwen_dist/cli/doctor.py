"""`qwen-dist doctor`: what a run on this machine would use, and what it has but would not use."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import platform as python_platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwen_dist.cli.console import make_console
from qwen_dist.cli.flags import DeviceFlags, Verb
from qwen_dist.config import DoctorConfig
from qwen_dist.runtime import settings
from qwen_dist.runtime.backend import COMPILATION_CACHE, find_devices, start_jax

if TYPE_CHECKING:
    import jax

    from qwen_dist.ops.gpu import GPUFeatures

EXAMPLES = """\
examples:
  qwen-dist doctor
  qwen-dist doctor --dtype float32 --json
exit code 1 if this machine has something that would not be used, with what to do"""

_PACKAGES = ("qwen-dist", "jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
# What each extra installs, as it is imported.
_EXTRAS = {
    "serve": "starlette",
    "structured": "llguidance",
    "eval": "lm_eval",
    "remote": "obstore",
    "parquet": "pyarrow",
    "parity": "torch",
    "yaml": "yaml",
}


def run(config: DoctorConfig, flags: DeviceFlags) -> int:
    """Print the report."""
    start_jax(flags.num_cpu_devices, config.dtype)
    report = examine(find_devices(), config.dtype, is_cpu_asked=flags.num_cpu_devices is not None)
    if flags.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 1 if report["missing"] else 0


def examine(devices: Sequence[jax.Device], dtype: str, *, is_cpu_asked: bool = False) -> dict[str, Any]:
    """Return the report of `qwen-dist doctor` as JSON values."""
    from qwen_dist.ops import gpu, native_library
    from qwen_dist.ops.dispatch import Backend

    platform, found = devices[0].platform, gpu.gpu_features()
    backends = {phase: Backend.of_platform(platform, len(devices), phase) for phase in ("inference", "train")}
    features: dict[str, Any] = {"cpu": native_library.describe_kernels()}
    if found.compute_capability > (0, 0):
        capability = ".".join(map(str, found.compute_capability))
        features["gpu"] = {"compute capability": capability, "cuDNN": found.cudnn_version, "Triton": found.has_triton}
    return {
        "versions": {"python": python_platform.python_version(), **_versions()},
        "platform": platform,
        "devices": [{"kind": one.device_kind, "memory_bytes": _memory(one)} for one in devices],
        "features": features,
        "backends": {phase: backend.value for phase, backend in backends.items()},
        "kernels": _kernels(backends, found),
        "settings": [*_settings(platform, dtype), *_compiler_settings(platform, len(devices))],
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in _EXTRAS.items()},
        "missing": list(_missing(platform, found, is_cpu_asked)),
    }


def _versions() -> dict[str, str]:
    import importlib.metadata

    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def _memory(device: jax.Device) -> int | None:
    """Return the bytes that programs may use on a device; None where the device does not say."""
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit")


def _kernels(backends: dict[str, Any], found: GPUFeatures) -> dict[str, dict[str, list[str]]]:
    """Return for each operation and phase the implementations that this machine can run, in the order they are tried."""
    from qwen_dist.ops.dispatch import Backend
    from qwen_dist.ops.table import dispatch_table

    needs = {"cudnn": found.max_cudnn_head_dim > 0, "triton": found.can_run_triton}
    return {
        op: {
            phase: [name for name in row[backend] if backend is not Backend.GPU or needs.get(name, True)]
            for phase, backend in backends.items()
        }
        for op, row in dispatch_table().items()
    }


def _settings(platform: str, dtype: str) -> Iterator[dict[str, str]]:
    """Yield the settings of the environment and of jax as they are, and who has set them."""
    import jax

    for one in settings.settings(platform, dtype):
        names = [name for name in (one.name, *one.other_names) if name in os.environ]
        if one.kind == "environment":
            name, value = (names[0], os.environ[names[0]]) if names else (one.name, "not set")
        else:
            name, value = one.name, str(jax.config.values[one.name])
        by = "you" if settings.is_overridden(one, os.environ) else "qwen-dist"
        yield {"name": name, "value": value, "set by": by, "reason": one.reason, "source": one.source}


def _compiler_settings(platform: str, num_devices: int) -> Iterator[dict[str, str]]:
    for phase in ("inference", "train"):
        for one in settings.compiler_settings(platform, num_devices, phase):
            name = f"{one.name} ({phase})"
            yield {"name": name, "value": one.value, "set by": "qwen-dist", "reason": one.reason, "source": one.source}


def _missing(platform: str, found: GPUFeatures, is_cpu_asked: bool) -> Iterator[str]:
    """Yield what this machine has and a run would not use, with what to do."""
    from qwen_dist.ops import gpu, native_library

    is_free = not is_cpu_asked and "JAX_PLATFORMS" not in os.environ
    if is_free and platform == "cpu" and settings.has_nvidia_gpu():
        yield "an NVIDIA GPU is here and jax does not use it: pip install 'qwen-dist[cuda]'"
    if is_free and platform == "cpu" and settings.has_tpu():
        yield "a TPU is here and jax does not use it: pip install 'qwen-dist[tpu]'"
    if platform == "cpu" and native_library.load() is None:
        yield "the CPU kernels were not compiled: install a C++ compiler, and qwen-dist again"
    if platform == "gpu" and found.compute_capability >= gpu.AMPERE:
        if found.cudnn_version < gpu.MIN_CUDNN:
            have = f"cuDNN is {found.cudnn_version}" if found.cudnn_version else "there is no cuDNN"
            yield f"{have}; attention needs {gpu.MIN_CUDNN} or newer: pip install -U 'qwen-dist[cuda]'"
        if not found.has_triton:
            yield "this jax has no Pallas for Triton, which paged attention and experts use: install another version of jax"
    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILATION_CACHE)).expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if "://" not in str(cache) and not os.access(existing, os.W_OK):
        yield f"{cache} cannot be written, so every start compiles all programs: set JAX_COMPILATION_CACHE_DIR"


def _print(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.table import Table

    console = make_console()
    say = functools.partial(console.print, soft_wrap=True)
    say("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    kinds = [one["kind"] for one in report["devices"]]
    memory = report["devices"][0]["memory_bytes"]
    of_each = f", {memory / 1e9:.1f} GB for programs on each" if memory else ""
    say(f"devices: {len(kinds)} × {kinds[0]} ({report['platform']}){of_each}")
    say(f"features: {report['features']['cpu']}")
    if "gpu" in report["features"]:
        say("of the GPU: " + ", ".join(f"{name} {value}" for name, value in report["features"]["gpu"].items()))
    shown = Table("operation", *(f"{phase} ({name})" for phase, name in report["backends"].items()))
    for op, row in report["kernels"].items():
        shown.add_row(op, *(" → ".join(names) for names in row.values()))
    console.print(shown)
    if report["settings"]:
        chosen = Table("setting", "value", "set by", "because")
        for one in report["settings"]:
            chosen.add_row(one["name"], one["value"], one["set by"], one["reason"])
        console.print(chosen)
    absent = [name for name, is_installed in report["extras"].items() if not is_installed]
    say("extras that are not installed: " + (", ".join(absent) or "none"))
    for text in report["missing"]:
        say(f"missing: {text}", markup=False)
    say("nothing is missing" if not report["missing"] else f"{len(report['missing'])} missing")


VERB = Verb(
    "doctor",
    DoctorConfig,
    DeviceFlags,
    run,
    EXAMPLES,
    usage="qwen-dist doctor [flags]",
)
