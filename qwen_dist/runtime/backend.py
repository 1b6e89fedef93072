"""Settings of jax, and the devices of a run: what is found, and what to install where none is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from typing import TYPE_CHECKING

from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.runtime.processors import count_processors
from qwen_dist.runtime.settings import expected_platform, is_overridden, set_environment, settings
from qwen_dist.runtime.stderr_filter import dropped_lines

if TYPE_CHECKING:
    import jax

COMPILATION_CACHE = "~/.cache/qwen_dist/compiled"
# The extra that brings each platform of jax, and what else it needs.
_EXTRAS = {"cuda": ("cuda", "an NVIDIA GPU with its driver"), "gpu": ("cuda", "an NVIDIA GPU with its driver")}
_EXTRAS |= {"tpu": ("tpu", "a TPU")}
# Lines of other libraries while devices are searched: those about GPUs are kept.
_NO_TPU = r"^(?!.*(?i:cuda|gpu|nvidia|rocm)).*$"


def start_jax(num_cpu_devices: int | None, dtype: str, *, use_compilation_cache: bool = True) -> None:
    """Configure jax, before any device is used. No other code changes jax's settings.

    Compiled programs are cached in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/qwen_dist/compiled, so that the second
    start of the same model on the same machine compiles nothing. `runtime.settings` has what GPUs and TPUs need.

    Args:
      num_cpu_devices: use this many CPU devices; None uses the default platform.
      dtype: float64 enables 64-bit types.
      use_compilation_cache: False when compiling for devices of another machine, whose programs cannot be read back.
    """
    import jax

    # XLA starts a thread for each processor that the process may run on, also where a container may use less of their time.
    if not {"PJRT_NPROC", "NPROC"} & os.environ.keys():
        os.environ["PJRT_NPROC"] = str(count_processors())
    chosen = settings("cpu" if num_cpu_devices is not None else expected_platform(os.environ), dtype)
    set_environment(os.environ, chosen)
    for one in chosen:
        if one.kind == "jax" and not is_overridden(one, os.environ):
            jax.config.update(one.name, one.value)
    if num_cpu_devices is not None:
        if num_cpu_devices < 1:
            raise UsageError(f"--num-cpu-devices {num_cpu_devices}: give at least 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(COMPILATION_CACHE).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not use_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)


def check_dtype(dtype: str) -> None:
    """Raise UsageError for float64 where jax computes in 32 bits: it would round without a word."""
    import jax

    if dtype == "float64" and not jax.config.values["jax_enable_x64"]:
        raise UsageError('float64 needs jax.config.update("jax_enable_x64", True) before any array is made')


def find_devices() -> list[jax.Device]:
    """Start the devices and return them.

    Where libtpu is installed (`plan --compile` uses it) and there is no TPU, it writes errors that mean nothing here.

    Raises:
      UserError: jax finds no device of the kind that JAX_PLATFORMS names.
    """
    import jax

    asked = jax.config.values["jax_platforms"] or ""
    is_noisy = not asked and importlib.util.find_spec("libtpu") is not None
    try:
        with dropped_lines(_NO_TPU) if is_noisy else contextlib.nullcontext():
            return jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(_describe_missing(asked, error)) from error


def _describe_missing(asked: str, error: BaseException) -> str:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    known = [name for name in names if name in _EXTRAS]
    reason = printable(next(iter(str(error).strip().splitlines()), ""), 200)
    if not names:
        return f"jax finds no device: {reason}"
    if not known:
        return f"JAX_PLATFORMS is {printable(asked)!r}, which is not a platform that jax has here; use cpu, cuda or tpu"
    extra, needs = _EXTRAS[known[0]]
    return (
        f"jax finds no {known[0]} device (JAX_PLATFORMS={printable(asked)}). It needs {needs} and the extra: "
        f"pip install 'qwen-dist[{extra}]'. To run on the processor: JAX_PLATFORMS=cpu"
        + (f". jax says: {reason}" * bool(reason))
    )
