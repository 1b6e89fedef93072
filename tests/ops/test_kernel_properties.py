"""Every build of the C++ kernels against plain loops over many sizes: see kernel_properties.cc."""

import importlib.machinery
import pathlib
import shutil
import subprocess

import pytest
from native_kernels import EXPECTED, needs_kernels

from qwen_dist.ops import native_library

SOURCE = pathlib.Path(__file__).parent / "kernel_properties.cc"
KERNELS = pathlib.Path(native_library.__file__).parent / "cpu"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-w"]
LIBRARY = KERNELS.parent / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> pathlib.Path:
    """The loops, linked with the library that the installation compiled."""
    path = tmp_path_factory.mktemp("kernels") / "properties"
    subprocess.run(
        ["c++", *FLAGS, "-O1", SOURCE, LIBRARY, "-o", path, "-pthread", f"-Wl,-rpath,{LIBRARY.parent}"], check=True
    )
    return path


def check(command: list) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "0 differences\n", done.stdout + done.stderr


@needs_kernels
@pytest.mark.parametrize("build", [*EXPECTED, *(pytest.param(build, marks=pytest.mark.slow) for build in EXPECTED)])
def test_a_build(build, program, request):
    check([program, build, 2000 if request.node.get_closest_marker("slow") else 60])


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="no compiler and emulator of 64-bit ARM (apt install g++-aarch64-linux-gnu qemu-user-static)",
)
def test_neon_in_an_emulator(tmp_path):
    sources = KERNELS / "neon.cc", KERNELS / "processor.cc", SOURCE
    command = ["aarch64-linux-gnu-g++", *FLAGS, "-O3", "-static", *sources, "-o", tmp_path / "neon", "-pthread"]
    subprocess.run(command, check=True)
    check(["qemu-aarch64-static", tmp_path / "neon", "neon", 60])
