"""The commands: quantise, generate with it, measure what it costs, plan it, inspect it; and what they refuse."""

import json

import jax
import numpy as np
import pytest
from test_formats import context

from qwen_dist.checkpoint.model import load_model
from qwen_dist.cli import main
from qwen_dist.models.parameters import with_parameters
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tiny_directory):
    return tiny_directory("qwen3", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)


def run(capsys, *arguments):
    assert main(list(map(str, arguments))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_quantised_checkpoint_answers_as_the_quantised_model(directory, tmp_path, capsys):
    made = json.loads(
        run(capsys, "quantize", "--model", directory, "--output", tmp_path / "int4", "--dtype", "float32", "--json")
    )
    assert made == {"output": str(tmp_path / "int4")}
    generate = ["generate", "--prompt", "the quick", "--dtype", "float32", "--max-new-tokens", 4, "--json", "--raw"]
    ours = json.loads(run(capsys, *generate, "--model", directory, "--quantize", "int4"))
    theirs = json.loads(run(capsys, *generate, "--model", tmp_path / "int4"))
    widened = json.loads(run(capsys, *generate, "--model", tmp_path / "int4", "--quantize", "none"))
    assert ours["token_ids"] == theirs["token_ids"] == widened["token_ids"]
    assert (tmp_path / "int4/tokenizer.json").exists()
    report = json.loads(run(capsys, "inspect", tmp_path / "int4", "--mesh", "data=8", "--json"))
    original = json.loads(run(capsys, "inspect", directory, "--mesh", "data=8", "--json"))
    assert report["parameters"] == original["parameters"] and report["bytes"] < original["bytes"]
    assert not report["problems"]
    exported = tmp_path / "exported"
    run(capsys, "export", "--model", tmp_path / "int4", "--output", exported, "--dtype", "float32")
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    dequantised = load_model(tmp_path / "int4", context(), dtype="float32", quantize="none").parameters
    again = load_model(exported, context(), dtype="float32").parameters
    for name, value in dequantised.items():
        np.testing.assert_array_equal(np.asarray(again[name]), np.asarray(value), err_msg=name)


def log_probabilities(loaded, tokens):
    positions = np.arange(len(tokens), dtype=np.int32)[None]

    @jax.jit
    def logits(parameters):
        model = with_parameters(loaded.module, parameters)
        return model.unembed(model(np.asarray(tokens, np.int32)[None], positions)[0])[0]

    x = np.asarray(logits(loaded.parameters), np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_divergence_is_that_of_the_distributions(directory, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 6)
    arguments = ["parity", "--model", directory, "--quantize", "int4", "--kl", text, "--json", "--config.kl_tokens=100"]
    report = json.loads(run(capsys, *arguments))
    tokens = Tokenizer.open(str(directory)).encode(text.read_text())[:100]
    options = QuantizeOptions("int4", 32)
    plain, quantised = (
        log_probabilities(load_model(directory, context(), dtype="float32", quantize=form), tokens)
        for form in ("none", options)
    )
    expected = (np.exp(plain) * (plain - quantised)).sum(-1)
    found = [report[name] for name in ("mean", "median", "tail")]
    np.testing.assert_allclose(found, [expected.mean(), np.median(expected), np.quantile(expected, 0.999)], rtol=1e-3)
    assert report["num_tokens"] == len(tokens) and 0 < report["mean"] < 1
    assert report["top_1"] == pytest.approx((plain.argmax(-1) == quantised.argmax(-1)).mean())


def test_plan_knows_it(directory, capsys):
    plans = {}
    for quantize in ("none", "int4"):
        arguments = ["plan", "--model", directory, "--topology", "cpu:8", "--mesh", "data=8"]
        arguments += ["--batch-size", 8, "--context", 64]
        plans[quantize] = json.loads(run(capsys, *arguments, "--quantize", quantize, "--json"))
    memory = [plan["chosen"]["phases"][-1]["memory"]["parameters"] for plan in plans.values()]
    assert memory[1] < memory[0]
    assert plans["int4"]["chosen"]["workload"]["quantization"] == "weights in int4, groups of 32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--prompt", "a", "--quantize", "int3"],
            "quantize is 'int3'; it must be 'stored' or 'none' or 'int8'",
        ),
        (["generate", "--prompt", "a", "--quantize-group-size", "32"], "--quantize-group-size 32 needs --quantize"),
        (["generate", "--prompt", "a", "--quantize", "int4", "--quantize-group-size", "40"], "choose a size that does"),
        (["parity", "--quantize", "int4"], "--kl-reference, --quantize and --kv-cache-dtype are for --kl TEXT_FILE"),
        (["parity", "--kl", "nowhere.txt"], "--kl compares two models: give --quantize, --kv-cache-dtype, or another one"),
        (["parity", "--kl", "nowhere.txt", "--quantize", "int8"], "--kl nowhere.txt cannot be read as text"),
        (["quantize", "--output", "o", "--quantize", "fp8", "--quantize-group-size", "32"], "one scale of each row"),
    ],
)
def test_what_cannot_be_is_said(directory, capsys, arguments, message):
    assert main([arguments[0], "--model", str(directory), *arguments[1:]]) != 0
    assert message in capsys.readouterr().err
