"""Fixtures: real processes on this machine, started by `launch/local.sh` or one by one."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 2},
    # A delta net and gated attention, each before experts.
    "qwen3_next": {"num_attention_heads": 8, "num_hidden_layers": 2, "num_experts": 8, "mlp_only_layers": []}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8},
}
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def launch() -> pathlib.Path:
    """The directory of the launchers."""
    return ROOT / "launch"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment variables for subprocesses: this checkout's `qwen-dist`, and no cluster."""
    paths = os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"]))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("QWEN_DIST_", "SLURM_", "TPU_"))}
    return kept | {"PYTHONPATH": str(ROOT), "PATH": paths, "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def start(environment) -> Iterator[Start]:
    """A function (command, **variables) that starts a program; programs that still run after the test are killed."""
    started: list[subprocess.Popen] = []

    def start(command: Sequence[str], cwd: pathlib.Path | None = None, **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | variables,
            start_new_session=True,
            cwd=cwd,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def qwen_dist(start) -> Start:
    """A function (arguments, **variables) that starts `qwen-dist`."""
    return lambda arguments, **variables: start([sys.executable, "-m", "qwen_dist.cli", *arguments], **variables)


@pytest.fixture(scope="session")
def family(request) -> str:
    """The family of the checkpoint; a test may name another."""
    return getattr(request, "param", "qwen3")


@pytest.fixture(scope="session")
def directory(tiny_directory, family) -> pathlib.Path:
    return tiny_directory(family, **SIZES[family])
