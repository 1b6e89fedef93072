"""The report says what a checkpoint contains, what loading it needs, and everything that is wrong."""

import io
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from qwen_dist.checkpoint.inspect import inspect
from qwen_dist.checkpoint.model import AbstractModel
from qwen_dist.errors import UsageError


@pytest.fixture
def folder(write_checkpoint):
    one = {f"model.layers.{i}.mlp.up_proj.weight": np.zeros((8, 4), "float16") for i in range(3)}
    two = {"model.embed_tokens.weight": np.zeros((100, 4), "float32"), "model.visual.x": np.zeros(3, "float16")}
    return write_checkpoint(
        {"1.safetensors": one, "2.safetensors": two}, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    )


def make_target(checkpoint):
    """Return the abstract model of the checkpoint above on eight devices."""
    assert checkpoint.config["model_type"] == "qwen3"
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    shapes = {f"layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(3)} | {"embed_tokens.weight": (100, 4)}
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    target = {name: jax.ShapeDtypeStruct(shape, "float16", sharding=sharding) for name, shape in shapes.items()}
    return AbstractModel(target, {}, is_tied=False)


def printed(report):
    out = io.StringIO()
    report.print(Console(file=out, width=120))
    return out.getvalue()


def test_report(folder):
    report = inspect(str(folder), make_target)
    assert (report.architecture, report.parameters, report.bytes) == ("Qwen3ForCausalLM", 499, 1798)
    assert report.dtypes == {"F16": 198, "F32": 1600} and report.files == {"1.safetensors": 192, "2.safetensors": 1606}
    assert report.load.skipped == ("model.visual.x",) and report.load.bytes_read == 1792
    assert set(report.load.bytes_per_device.values()) == {(400 + 96) * 2 // 8}
    assert not report.problems
    text = printed(report)
    for line in (
        "Qwen3ForCausalLM",
        "up_proj.weight  3 x F16 [8, 4]",
        "{0-2}",
        "embed_tokens.weight  F32 [100, 4]",
        "load",
    ):
        assert line in text
    again = json.loads(report.to_json())
    assert again["parameters"] == 499 and again["load"]["digest"] == report.load.digest
    assert [group["tensors"] for group in again["groups"]] == [3, 1, 1]


def test_odd_names_are_printed_as_text(write_checkpoint):
    names = ["[/bold]", "a.[red]b", "a.\x1b[2J", f"layers.{'9' * 5000}.w", ".".join("a" * 3000), ".".join("a" * 3001)]
    folder = write_checkpoint(
        {"model.safetensors": {name: np.zeros(2, "float16") for name in names}}, {"architectures": 5, "model_type": [1]}
    )
    report = inspect(str(folder))
    text = printed(report)
    assert not report.problems and report.parameters == 12
    assert "[/bold]  F16 [2]" in text and "[red]b  F16 [2]" in text and r"\x1b[2J" in text and "\x1b" not in text


def test_only_headers_are_read(folder, monkeypatch):
    monkeypatch.setattr("qwen_dist.checkpoint.load.execute_plan", lambda *_: pytest.fail("data was read"))
    assert inspect(str(folder), make_target).load.over_read == 1.0


def test_all_problems_are_listed(folder):
    (folder / "1.safetensors").write_bytes(b"<html>" * 10)
    (folder / "2.safetensors").unlink()
    report = inspect(str(folder), make_target)
    assert len(report.problems) == 2 and report.load is None
    assert "HTML" in report.problems[0] and "No such file" in report.problems[1]
    lines = printed(report).splitlines()
    assert [line.startswith("problem  ") for line in lines[:3]] == [True, True, False]  # first, so that they are seen
    assert inspect(str(folder / "nowhere")).problems


def test_a_model_that_does_not_fit_is_a_problem(folder):
    def too_small(checkpoint):
        model = make_target(checkpoint)
        del model.target["layers.1.mlp.up_proj.weight"]
        return model

    report = inspect(str(folder), too_small)
    assert report.problems == ["unexpected: model.layers.1.mlp.up_proj.weight"] and report.parameters == 499

    def refuse(checkpoint):
        raise UsageError("tensor=3 does not divide 8 heads")

    assert inspect(str(folder), refuse).problems == ["tensor=3 does not divide 8 heads"]
