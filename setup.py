"""Compile the C++ kernels for CPUs, which pyproject.toml cannot declare."""

import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "qwen_dist.ops._native",
            sorted(glob.glob("qwen_dist/ops/cpu/*.cc")),
            depends=sorted(glob.glob("qwen_dist/ops/cpu/*.h") + glob.glob("third_party/xla/ffi/api/*.h")),
            include_dirs=["third_party"],
            # -ffp-contract=off: every copy of a loop rounds alike. -w: the warnings are about XLA's headers.
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-g0", "-w"],
            language="c++",
            # The installation also succeeds without a compiler: XLA then does the work, slower.
            optional=True,
        )
    ]
)
