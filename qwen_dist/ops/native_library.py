"""The compiled C++ kernels as a library, and what this processor has of what they need. No jax.

`native` makes jax functions of them. This part alone is enough to say which kernels an installation has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import pathlib

# The processor features that the kernels need, in the order of the bits that the library reports.
FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")


@functools.cache
def load() -> ctypes.CDLL | None:
    """Load the compiled kernels; None where the installation did not compile them."""
    folder = pathlib.Path(__file__).parent
    compiled = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    return ctypes.CDLL(str(compiled[0])) if compiled else None


def processor_features() -> frozenset[str]:
    """Return those of `FEATURES` that this processor has; none where the kernels were not compiled.

    The environment variable QWEN_DIST_CPU_FEATURES, a list with commas, leaves out all others: with it a machine that has
    the kernels measures and tests what happens on one that has not.
    """
    library = load()
    bits = library.ProcessorFeatures() if library is not None else 0
    allowed = os.environ.get("QWEN_DIST_CPU_FEATURES")
    names = {name for bit, name in enumerate(FEATURES) if bits >> bit & 1}
    return frozenset(names if allowed is None else names & set(allowed.replace(" ", "").split(",")))


def describe_kernels() -> str:
    """Return which kernels inference on this machine's CPU can use, for `--version`."""
    if load() is None:
        return "no CPU kernels: they were not compiled, XLA does the work"
    missing = [name for name in FEATURES if name not in processor_features()]
    return f"no CPU kernels: this processor lacks {', '.join(missing)}" if missing else "CPU kernels: avx512-bf16"
