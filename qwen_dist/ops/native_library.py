"""The compiled C++ kernels as a library, and which build of them runs on this processor. No jax.

`native` makes jax functions of them. This part alone is enough to say which kernels an installation has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import pathlib

from qwen_dist.errors import UsageError

# The builds of the kernels, the best first, in the order of the bits that the library reports.
BUILDS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "neon")
# The name for none of them: XLA does the work.
PLAIN = "plain"
# The environment variable that forces a build.
VARIABLE = "QWEN_DIST_CPU"


@functools.cache
def load() -> ctypes.CDLL | None:
    """Load the compiled kernels; None where the installation did not compile them."""
    folder = pathlib.Path(__file__).parent
    compiled = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    return ctypes.CDLL(str(compiled[0])) if compiled else None


def available_builds() -> tuple[str, ...]:
    """Return the builds that this processor can run, the best first; none where the kernels were not compiled."""
    library = load()
    bits = library.ProcessorBuilds() if library is not None else 0
    return tuple(name for bit, name in enumerate(BUILDS) if bits >> bit & 1)


def active_build() -> str:
    """Return the build that inference on a CPU uses, or `PLAIN`: the best, or that which QWEN_DIST_CPU names.

    Raises:
      UsageError: QWEN_DIST_CPU names a build that does not exist, or that this processor or installation does not have.
    """
    available = available_builds()
    name = os.environ.get(VARIABLE)
    if name is None:
        return available[0] if available else PLAIN
    if name == PLAIN or name in available:
        return name
    allowed = ", ".join((*available, PLAIN))
    if name not in BUILDS:
        raise UsageError(f"{VARIABLE}={name}: there is no such build of the CPU kernels; this machine has {allowed}")
    reason = "the kernels were not compiled" if load() is None else "this processor lacks its instructions"
    raise UsageError(f"{VARIABLE}={name}: {reason}; this machine has {allowed}")


def is_available() -> bool:
    """Return whether inference on a CPU uses the kernels: they were compiled, for instructions that this processor has."""
    return active_build() != PLAIN


def describe_kernels() -> str:
    """Return which kernels inference on this machine's CPU uses, for `--version`."""
    if load() is None:
        return "no CPU kernels: they were not compiled, XLA does the work"
    build = active_build()
    if build != PLAIN:
        return f"CPU kernels: {build}"
    reason = f"{VARIABLE}={PLAIN}" if available_builds() else "there is no build for this processor"
    return f"no CPU kernels: {reason}, XLA does the work"
