"""The mark for tests of the C++ kernels: it skips them only where the kernels cannot be compiled or run."""

import os
import pathlib
import shutil

import pytest

CPU_INFO = pathlib.Path("/proc/cpuinfo")
IS_MASKED = "QWEN_DIST_CPU_FEATURES" in os.environ
HAS_INSTRUCTIONS = CPU_INFO.exists() and "avx512_bf16" in CPU_INFO.read_text() and not IS_MASKED
needs_kernels = pytest.mark.skipif(
    not HAS_INSTRUCTIONS or shutil.which("c++") is None, reason="no processor with AVX512-BF16, or no compiler"
)
