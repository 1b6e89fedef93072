"""Compile the C++ kernels for CPUs, which pyproject.toml cannot declare."""

import glob
import os
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class ParallelBuild(build_ext):
    """Compile the files of an extension at the same time: each is one build of the kernels and takes half a minute."""

    def build_extensions(self):
        compile_files = self.compiler.compile

        def compile_in_parallel(sources, *args, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_files([source], *args, **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_in_parallel
        super().build_extensions()


setup(
    cmdclass={"build_ext": ParallelBuild},
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
    ],
)
