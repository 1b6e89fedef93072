"""The part of the installation that pyproject.toml has no words for: the kernel, where there is a compiler for it."""

import pathlib

import jaxlib
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "qwen_dist.models._native",
            ["qwen_dist/models/native.cc"],
            include_dirs=[str(pathlib.Path(jaxlib.__file__).parent / "include")],
            # The headers are XLA's, and so are their warnings.
            extra_compile_args=["-std=c++17", "-O3", "-w"],
            language="c++",
            # Without it products are XLA's: slower in bfloat16, and right.
            optional=True,
        )
    ]
)
