"""The host memory budget is a bound: checked against the peak memory of a loading process, as the system reports it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_dist.checkpoint.safetensors import build_header

MB = 10**6
# Memory that a load may use in addition to its budget: code, threads, the plan.
CONSTANT = 100 * MB


@pytest.fixture
def write_zeros(tmp_path):
    """A function that writes a checkpoint of about `nbytes` zeros in a sparse file, which takes no disk space."""

    def write(nbytes, embed=2048, mlp=11008, vocab=151_936):
        tensors = {"model.embed_tokens.weight": ("BF16", (vocab, embed)), "model.norm.weight": ("BF16", (embed,))}
        layer, size = 0, 2 * vocab * embed
        while size < nbytes:
            for name, shape in {
                "mlp.up_proj": (mlp, embed),
                "mlp.down_proj": (embed, mlp),
                "o_proj": (embed, embed),
            }.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = ("BF16", shape)
                size += 2 * shape[0] * shape[1]
            layer += 1
        header = build_header(tensors, {})
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + size + 2 * embed)
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    return write


def measure(folder, budget, kind, where, *output):
    worker = Path(__file__).with_name("memory_worker.py")
    environment = os.environ | {"PYTHONPATH": str(worker.parents[2])}
    command = [sys.executable, worker, folder, str(budget), kind, where, *output]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output)


def check(folder, budget, kind, where):
    found = measure(folder, budget, kind, where)
    # Replicas share one buffer: the arrays take the checkpoint's bytes once; the budget is added to that.
    assert found["arrays"] <= found["bytes"] * 1.01 + MB
    assert found["growth"] - found["arrays"] <= budget + CONSTANT, found


@pytest.mark.parametrize("kind", ["rows", "columns", "replicated"])
def test_600_megabytes_within_32(write_zeros, kind):
    check(write_zeros(600 * MB, vocab=50_000), 32 * MB, kind, "host")


@pytest.mark.slow
def test_600_megabytes_within_32_through_transfers(write_zeros, monkeypatch):
    """As for accelerators, in chunks. Here "device" memory is host memory, so malloc must not keep what is freed."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    check(write_zeros(600 * MB, embed=2048, mlp=2048, vocab=2048), 32 * MB, "columns", "devices")


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_saving_stays_within_the_budget_too(write_zeros, tmp_path, kind):
    folder, output = write_zeros(300 * MB, vocab=50_000), tmp_path / "saved"
    try:
        assert measure(folder, 32 * MB, kind, "host", output)["growth"] <= 32 * MB + CONSTANT
        assert sum(path.stat().st_size for path in output.iterdir()) > 300 * MB
    finally:
        shutil.rmtree(output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_6_gigabytes_within_256_megabytes(write_zeros, kind):
    check(write_zeros(6000 * MB), 256 * MB, kind, "host")
