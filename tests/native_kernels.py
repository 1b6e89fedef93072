"""The mark for tests of the C++ kernels, and a fixture that runs a test with each build that this machine has."""

import os
import pathlib
import shutil

import jax
import pytest

from qwen_dist.ops.native_library import BUILDS, PLAIN, VARIABLE

CPU_INFO = pathlib.Path("/proc/cpuinfo")
# What the processor says of itself: kernels that were not compiled fail instead of being skipped.
NEEDS = {"amx_bf16": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512vl", "avx2": "avx2", "neon": "asimd"}
FEATURES = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
EXPECTED = [build for build in BUILDS if NEEDS[build] in FEATURES]
CAN_RUN = EXPECTED and os.environ.get(VARIABLE) != PLAIN and shutil.which("c++")
needs_kernels = pytest.mark.skipif(not CAN_RUN, reason="no processor with a build of the kernels, or no compiler")


_traced_build: str | None = None  # the build of the functions that jax has traced


@pytest.fixture(params=[pytest.param(build, marks=pytest.mark.slow if build != EXPECTED[0] else ()) for build in EXPECTED])
def cpu_build(request, monkeypatch):
    """Each build that this processor can run. The default tests run the best: test_kernel_properties.py is about all."""
    monkeypatch.setenv(VARIABLE, request.param)
    global _traced_build
    if request.param != _traced_build:
        jax.clear_caches()  # a program calls the build with which it was traced
        _traced_build = request.param
    return request.param
