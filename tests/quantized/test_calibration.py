"""GPTQ: the values of the textbook's recursion, smaller errors than the nearest values, on any mesh and in every family."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from packed_files import mostly_slow
from test_formats import context

from qwen_dist.checkpoint.calibration import calibrate
from qwen_dist.checkpoint.model import load_model
from qwen_dist.cli import main
from qwen_dist.errors import UserError
from qwen_dist.ops.grouped_weight import GroupedFormat, unpack_runs
from qwen_dist.parity.kl import KlOptions, compare_distributions
from qwen_dist.quantization.gptq import DAMPING, round_with_feedback
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.quantization.rounding import LIMITS, quantize

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def sample(rng, rows, columns, num_inputs):
    """Return a weight [O, C] and inputs [N, C] that depend on each other, of very different sizes."""
    inputs = rng.normal(size=(num_inputs, columns)) @ rng.normal(size=(columns, columns))
    inputs *= np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)).astype(np.float32), inputs.astype(np.float32)


def textbook(weight, moments, scale, limits):
    """Return the values [O, C] by the recursion of the paper in float64: the inverse without a column, step by step."""
    moments = moments.astype(np.float64)
    inverse = np.linalg.inv(moments + DAMPING * np.diagonal(moments).mean() * np.eye(len(moments)))
    left, values = weight.astype(np.float64), np.zeros(weight.shape)
    for column in np.argsort(-np.diagonal(moments)):
        values[:, column] = np.rint(left[:, column] / scale[:, column]).clip(*limits)
        error = (left[:, column] - values[:, column] * scale[:, column]) / inverse[column, column]
        left = left - error[:, None] * inverse[column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values


@pytest.mark.parametrize(("encoding", "group", "columns"), [("int4", 32, 192), ("int8", 32, 96), ("int8", 0, 130)])
def test_the_values_are_those_of_the_textbook(encoding, group, columns):
    weight, inputs = sample(np.random.default_rng(0), 24, columns, 4 * columns)
    form = GroupedFormat(encoding, columns, group or columns, "float32", "float32")
    nearest, scale = quantize(weight.reshape(24, -1, form.group_size), encoding, np.dtype("float32"))
    nearest, scale = nearest.reshape(weight.shape), scale[..., 0]
    moments = inputs.T @ inputs
    found = np.asarray(round_with_feedback(jnp.asarray(weight), jnp.asarray(moments), jnp.asarray(scale), form))
    found = (unpack_runs(found) if encoding == "int4" else found).reshape(weight.shape)
    by_column = np.repeat(scale, form.group_size, axis=1)
    np.testing.assert_array_equal(found, textbook(weight, moments, by_column, LIMITS[encoding]))
    errors = [np.square((values * by_column - weight) @ inputs.T).sum() for values in (nearest, found)]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_never_occur_keep_the_nearest_values():
    weight, inputs = sample(np.random.default_rng(1), 8, 64, 200)
    inputs[:, 32:] = 0
    form = GroupedFormat("int8", 64, 32, "float32", "float32")
    nearest, scale = quantize(weight.reshape(8, 2, 32), "int8", np.dtype("float32"))
    for moments in (inputs.T @ inputs, np.zeros((64, 64), np.float32)):
        found = round_with_feedback(jnp.asarray(weight), jnp.asarray(moments), jnp.asarray(scale[..., 0]), form)
        np.testing.assert_array_equal(np.asarray(found).reshape(8, 2, 32)[:, 1], nearest[:, 1])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("family", mostly_slow(("qwen3", "qwen3_moe", "qwen3_5"), ("qwen3_5",)))
def test_a_calibrated_checkpoint_is_nearer_to_the_original(small_directory, family, text, tmp_path, capsys):
    """By the divergence of its answers; its scales and all else are those of the nearest values."""
    original = str(small_directory(family))
    form = {"quantize": "int4", "dtype": "float32"}
    flags = ["--dtype", "float32", "--quantize", "int4", "--calibration", text, "--output", tmp_path / "new"]
    assert main([str(x) for x in ("quantize", "--model", original, *flags)]) == 0, capsys.readouterr().err
    options = QuantizeOptions("int4", 32)
    nearest = load_model(original, context(), dtype="float32", quantize=options).parameters
    found = load_model(tmp_path / "new", context(), dtype="float32", quantize="stored").parameters
    assert found.keys() == nearest.keys()
    changed = {name for name, x in nearest.items() if not np.array_equal(np.asarray(x), np.asarray(found[name]))}
    linears = {name for name, x in nearest.items() if x.dtype == jnp.uint8 and "experts.down_proj" not in name}
    assert changed == linears
    before = compare_distributions(KlOptions(original, "", str(text), **form))
    after = compare_distributions(KlOptions(str(tmp_path / "new"), original, str(text), **form | {"quantize": "stored"}))
    assert after.mean < 0.8 * before.mean


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "tensor=2"])
def test_a_mesh_gives_the_values_of_one_device(small, mesh):
    tokens, options = list(range(3, 103)) * 3, QuantizeOptions("int4", 32)

    def run(mesh):
        model, quantized = (
            load_model(small("qwen3_5"), context(mesh), dtype="float32", quantize=q) for q in ("none", options)
        )
        return calibrate(model, quantized, tokens).parameters

    one, many = run("data=1"), run(mesh)
    for name, value in one.items():
        # A value in the middle between two others may become either, and then others follow.
        assert np.mean(np.asarray(many[name]) != np.asarray(value)) < 0.02, name


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--quantize", "fp8"], 2, "--calibration is for --quantize int8 and int4; it is fp8"),
        (["--config.calibration_tokens=1"], 2, "calibration_tokens is 1; it must be at least 2"),
        (["--calibration", "no/such.txt"], 1, "--calibration no/such.txt cannot be read as text"),
    ],
)
def test_what_cannot_be_used_is_refused(small_directory, text, tmp_path, capsys, flags, status, message):
    arguments = [
        "quantize",
        "--model",
        small_directory("qwen3"),
        "--output",
        tmp_path / "new",
        "--calibration",
        text,
        *flags,
    ]
    assert main([str(x) for x in arguments]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_refused(small):
    load = functools.partial(load_model, small("qwen3"), context(), dtype="float32")
    model, quantized = load(quantize="none"), load(quantize=QuantizeOptions("int4", 32))
    embedding = model.parameters["embed_tokens.weight"]
    model.parameters["embed_tokens.weight"] = embedding.at[5].set(jnp.inf)
    with pytest.raises(UserError, match=r"the inputs of layers\.0\.\S+ are not finite"):
        calibrate(model, quantized, [3, 4, 5, 6])
