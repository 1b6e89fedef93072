"""The part of the installation that pyproject.toml has no words for: the kernels, where there is a compiler for it."""

import glob
import pathlib

import jaxlib
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "qwen_dist.ops._native",
            sorted(glob.glob("qwen_dist/ops/cpu/*.cc")),
            depends=sorted(glob.glob("qwen_dist/ops/cpu/*.h")),
            include_dirs=[str(pathlib.Path(jaxlib.__file__).parent / "include")],
            # The headers are XLA's, and so are their warnings.
            extra_compile_args=["-std=c++17", "-O3", "-w"],
            language="c++",
            # Without them XLA does the work: slower, and right.
            optional=True,
        )
    ]
)
