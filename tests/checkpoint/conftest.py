"""A fixture that writes small checkpoints, and a summary of the fault cases that ran."""

import json

import pytest
import safetensors.numpy


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    cases = [report for report in reports if report.when == "call" and "fault" in report.keywords]
    passed = sum(report.passed for report in cases)
    if cases:
        terminalreporter.write_line(f"loader fault cases: {passed} of {len(cases)} handled correctly")


@pytest.fixture
def write_checkpoint(tmp_path):
    """A function that writes {file name: {tensor name: array}}, a config.json and, for several files, an index."""

    def write(files, config=None, folder=tmp_path / "checkpoint", index=None):
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            safetensors.numpy.save_file(tensors, folder / name)
        if index is None and len(files) > 1:
            index = {"weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "qwen3"}))
        return folder

    return write
