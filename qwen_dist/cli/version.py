"""`--version`: the versions that decide what is computed, and how fast. It imports no jax, so it answers at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import qwen_dist


def describe_version() -> str:
    """Return the versions of this package and of jax, and the kernels that this machine can use."""
    import importlib.metadata

    from qwen_dist.ops.native_library import describe_kernels

    return f"qwen-dist {qwen_dist.__version__} (jax {importlib.metadata.version('jax')}; {describe_kernels()})"


class VersionAction(argparse.Action):
    """Print the version and exit. Unlike argparse's own action it looks for versions only when it is asked."""

    def __init__(self, option_strings: Any, dest: str, **_: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show versions and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print to standard output, and end with exit code 0."""
        print(describe_version())
        parser.exit()
