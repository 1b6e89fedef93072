"""Limit a benchmark to the instructions of an older processor, and say what it runs with."""

from __future__ import annotations

import argparse
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

# What tells each library to use no newer instructions: this project's kernels, XLA, PyTorch and the two libraries below it.
LIMITS = {
    "avx2": {
        "QWEN_DIST_CPU": "avx2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "QWEN_DIST_CPU": "avx512",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "QWEN_DIST_CPU": "avx512_bf16",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX512_BF16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instructions", choices=LIMITS, help="limit both systems to these instructions of the processor")


def limit(options: argparse.Namespace) -> None:
    """Set the variables that this process and those that it starts inherit."""
    os.environ.update(LIMITS.get(options.instructions, {}))


def read_rate(gigabytes: float = 1.0) -> float:
    """Return the GB/s at which one thread for each core reads memory: each looks for the largest number of an array."""
    import numpy as np

    from qwen_dist.runtime.processors import count_processors

    arrays = [np.ones(int(gigabytes * 1e9 / 8 / count_processors()), np.uint64) for _ in range(count_processors())]
    seconds = []
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            seconds.append(time.perf_counter() - start)
    return sum(array.nbytes for array in arrays) / min(seconds) / 1e9


def describe(*packages: str) -> str:
    from qwen_dist.ops.native_library import active_build
    from qwen_dist.runtime.processors import count_processors

    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    line = f"{platform.machine()}, {count_processors()} cores; {versions}; CPU kernels {active_build()}"
    limits = [f"{name}={os.environ[name]}" for name in LIMITS["avx2"] if name in os.environ]
    return f"{line}\nlimited by {' '.join(limits)}" if limits else line
