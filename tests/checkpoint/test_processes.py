"""Several real processes: each reads only its own shards, and if one fails, all report its error within seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

PROCESSES = 3
SHAPE = (600, 120)
# Process 1 is killed in the last scenario and does not report it.
SURVIVORS = (0, 2)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The reports of one run of all scenarios: {scenario: {process: report}}."""
    folder = tmp_path_factory.mktemp("processes")
    write(folder / "good", seed=0)
    write(folder / "other", seed=0, swap=True)
    write(folder / "missing", seed=0)
    (folder / "missing" / "2.safetensors").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    worker = Path(__file__).with_name("worker.py")
    environment = os.environ | {"PYTHONPATH": str(worker.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, folder, address, str(PROCESSES), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(PROCESSES)
    ]
    found = {}
    try:
        for i, process in enumerate(processes):
            out, err = process.communicate(timeout=150)
            assert process.returncode == (-9 if i == 1 else 0), err
            for line in out.splitlines():
                if line.startswith("{"):
                    report = json.loads(line)
                    found.setdefault(report["scenario"], {})[i] = report
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def write(folder, seed, swap=False):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    if swap:
        names.reverse()
    tensors = {name: rng.standard_normal(SHAPE).astype("bfloat16") for name in names}
    tensors["model.norm.weight"] = rng.standard_normal(SHAPE[1]).astype("bfloat16")
    files = {"1.safetensors": names[:2], "2.safetensors": [*names[2:], "model.norm.weight"]}
    for file, inside in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "qwen3"}')


@pytest.mark.parametrize("kind", ["rows", "columns", "replicated"])
def test_each_process_reads_its_own_shards(outcomes, kind):
    """Process 1 passes its target in reverse order. The bytes that the system counts are those of the plan."""
    matrices, vector = 4 * SHAPE[0] * SHAPE[1] * 2, SHAPE[1] * 2
    num_shards = 1 if kind == "replicated" else PROCESSES
    for report in outcomes[kind].values():
        assert "error" not in report, report
        result = report["result"]
        assert result["needed"] == matrices // num_shards + vector
        assert result["planned"] <= (1.02 if kind == "rows" else 3.0) * result["needed"]
        assert result["planned"] <= result["read"] <= result["planned"] + 4096
    assert len(outcomes[kind]) == PROCESSES


@pytest.mark.fault
@pytest.mark.parametrize(
    ("scenario", "processes", "message"),
    [
        ("different_files", range(PROCESSES), "see different checkpoints"),
        ("missing_file", range(PROCESSES), "2.safetensors cannot be read"),
        ("failing_read", range(PROCESSES), "nowhere cannot be read"),
        ("save_that_fails_on_one", range(PROCESSES), "saved-rows exists"),
        ("dies_while_loading", SURVIVORS, "processes [1] did not finish within 3 s"),
    ],
)
def test_a_failure_of_one_process_fails_all(outcomes, scenario, processes, message):
    reports = outcomes[scenario]
    assert sorted(reports) == list(processes)
    for report in reports.values():
        assert message in report["error"]
        assert report["seconds"] < 20


@pytest.mark.fault
def test_the_others_wait_for_a_slow_process_and_report_it(outcomes):
    for process, report in outcomes["slow_process"].items():
        assert "error" not in report, report
        if process != 1:
            assert any("waiting for processes [1]" in message for message in report["result"]["messages"])


def test_save_from_all_processes(outcomes):
    assert len(outcomes["save_and_read_back"]) == PROCESSES
    assert not any("error" in report for report in outcomes["save_and_read_back"].values())
