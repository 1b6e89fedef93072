"""Weights that are quantised while they load: nearest values, bounded memory, packed size, and what stays as it is."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packed_files import mostly_slow
from test_formats import context, logits, same

from qwen_dist import LLM
from qwen_dist.checkpoint.load import make_load_plan
from qwen_dist.checkpoint.model import abstract_model, load_model
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import UsageError
from qwen_dist.ops.grouped_weight import unpack_runs
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.quantization.rounding import DIVISORS, LIMITS, quantize

OPTIONS = {
    "int4": QuantizeOptions("int4", 32),
    "int8": QuantizeOptions("int8", 32),
    "int8 row": QuantizeOptions("int8", 0),
    "fp8 row": QuantizeOptions("float8_e4m3fn", 0),
}


@pytest.mark.parametrize("encoding", ["int4", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_every_value_is_the_nearest_of_the_best_scale(encoding, scale_dtype):
    """Searched by brute force, group by group; zeros and outliers among them."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((12, 32)).astype(np.float32) * rng.uniform(0.01, 1, (12, 1)).astype(np.float32)
    groups[0], groups[1, 3] = 0, 50
    values, scale = quantize(groups, encoding, np.dtype(scale_dtype))
    low, high = LIMITS[encoding]
    if encoding == "float8_e4m3fn":
        allowed = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        allowed = np.unique(allowed[np.isfinite(allowed)])
    else:
        allowed = np.arange(low, high + 1, dtype=np.float32)
    for group, found, one_scale in zip(groups, values.astype(np.float32), scale.astype(np.float32)[:, 0], strict=True):
        errors = []
        for divisor in DIVISORS[encoding]:
            largest = group[np.abs(group).argmax()] if encoding == "int4" else np.abs(group).max()
            candidate = np.float32((largest / np.float32(divisor)).astype(scale_dtype)) or np.float32(1)
            error = np.abs(allowed[None] * candidate - group[:, None]).min(axis=1)
            errors.append(np.square(error).sum())
        mine = np.abs(found * one_scale - group)
        nearest = np.abs(allowed[None] * one_scale - group[:, None]).min(axis=1)
        np.testing.assert_allclose(mine, nearest, rtol=1e-5, atol=1e-7)
        assert np.square(mine).sum() <= min(errors) * (1 + 1e-5)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        quantize(np.array([[1.0, np.inf]]), "int8", np.dtype("float32"))


FAMILIES = [(family, form) for family in ("qwen3", "qwen3_moe", "qwen3_5") for form in OPTIONS]
DEFAULT = [("qwen3", "int4"), ("qwen3_moe", "int8"), ("qwen3_5", "fp8 row")]


@pytest.mark.parametrize(("family", "form"), mostly_slow(FAMILIES, DEFAULT))
def test_weights_of_layers_and_experts_are_quantised_and_no_others(small, family, form):
    options = OPTIONS[form]
    plain = load_model(small(family), context(), dtype="float32").parameters
    loaded = load_model(small(family), context(), dtype="float32", quantize=options)
    names = {one.weight.name for one in loaded.kept}
    kept = (
        "embed_tokens.weight",
        "lm_head.weight",
        "mlp.gate.weight",
        "norm.weight",
        "in_proj_a.weight",
        "in_proj_b.weight",
    )
    assert names and all(
        name in names
        or plain[name].ndim == 1
        or name.endswith((*kept, "conv1d.weight"))
        or "A_log" in name
        or "dt_bias" in name
        for name in plain
    )
    assert not [name for name in names if name.endswith(kept)]
    for name in plain.keys() - names:
        np.testing.assert_array_equal(np.asarray(plain[name]), np.asarray(loaded.parameters[name]))
    for one in loaded.kept:
        width = one.weight.in_features
        groups = np.asarray(plain[one.weight.name]).reshape(-1, width // one.form.group_size, one.form.group_size)
        values, scale = quantize(groups, options.encoding, np.dtype("float32"))
        stored, of_scale = (np.asarray(loaded.parameters[one.weight.name + suffix]) for suffix in ("", "_scale"))
        stored = np.asarray(unpack_runs(jnp.asarray(stored))) if options.encoding == "int4" else stored
        np.testing.assert_array_equal(stored.reshape(groups.shape), values)
        np.testing.assert_array_equal(of_scale.reshape(scale.shape), scale)


SHARDED = [
    ("qwen3_moe", "int4", "expert=2,tensor=2"),
    ("qwen3_5", "int8", "tensor=2"),
    ("qwen3", "int4", "fsdp=2"),
    ("qwen3", "int8 row", "fsdp=2"),
]


@pytest.mark.parametrize(("family", "form", "mesh"), mostly_slow(SHARDED, SHARDED[:2]))
def test_sharded_is_one_device(small, family, form, mesh):
    with jax.enable_x64(True):
        one, sharded = (
            load_model(small(family), context(on), dtype="float64", quantize=OPTIONS[form]) for on in ("", mesh)
        )
        same(sharded.parameters, one.parameters)
        np.testing.assert_allclose(logits(sharded), logits(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", OPTIONS)
def test_resident_bytes_are_those_of_the_packed_values(small, form):
    """Bits of the values, a scale of 16 bits for each group, and the parameters that are not quantised."""
    options = OPTIONS[form]
    loaded = load_model(small("qwen3_moe"), context(), dtype="bfloat16", quantize=options)
    expected = 0
    for one in loaded.kept:
        size = math.prod(one.weight.shape)
        expected += size * (4 if options.encoding == "int4" else 8) // 8 + 2 * size // one.form.group_size
    packed = {one.weight.name + suffix for one in loaded.kept for suffix in ("", "_scale")}
    expected += sum(array.nbytes for name, array in loaded.parameters.items() if name not in packed)
    assert sum(array.nbytes for array in loaded.parameters.values()) <= 1.05 * expected


def test_the_buffers_stay_within_the_budget(small):
    """Chunks are so small that a chunk and what it takes to quantise it fit."""
    checkpoint, budget = open_checkpoint(small("qwen3")), 2**18
    model = abstract_model(checkpoint, context(), "float32", quantize=OPTIONS["int4"])
    plan = make_load_plan(
        checkpoint,
        model.target,
        disk_shapes=model.disk_shapes,
        tied=model.is_tied,
        packed=model.packed,
        host_memory_budget=budget,
    )
    assert plan.host_memory_bytes <= budget
    sources = [chunk for request in plan.requests for chunk in request.chunks if chunk.parameter.source is not None]
    assert len(sources) > len(model.kept)
    assert all(chunk.nbytes * chunk.parameter.expansion <= plan.chunk_bytes for chunk in sources)


def test_fp8_checkpoints_are_kept_dequantised_or_quantised_again(small, tmp_path):
    """Blocks of 24 × 40, which divide no weight, and scales of each expert's matrix alone."""
    import json
    import shutil

    import safetensors.numpy

    rng, block = np.random.default_rng(0), (24, 40)
    shutil.copytree(small("qwen3_5"), tmp_path / "fp8")
    tensors, plain = safetensors.numpy.load_file(small("qwen3_5") / "model.safetensors"), {}
    for name, array in list(tensors.items()):
        plain[name] = array
        if array.ndim == 2 and "proj" in name and not name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
            values = array.astype(ml_dtypes.float8_e4m3fn)
            shape = tuple(-(-size // of) for size, of in zip(array.shape, block, strict=True))
            scale = rng.uniform(0.5, 2, shape).astype("float32")
            tensors[name], tensors[name + "_scale_inv"] = values, scale
            plain[name] = np.empty(array.shape, "float32")
            for row, column in np.ndindex(array.shape):
                plain[name][row, column] = np.float32(values[row, column]) * scale[row // block[0], column // block[1]]
    shutil.copytree(small("qwen3_5"), tmp_path / "plain")
    safetensors.numpy.save_file(tensors, tmp_path / "fp8/model.safetensors")
    safetensors.numpy.save_file(plain, tmp_path / "plain/model.safetensors")
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    expected = load_model(tmp_path / "plain", context(), dtype="float32")
    same(load_model(tmp_path / "fp8", context(), dtype="float32", quantize="none").parameters, expected.parameters)
    packed = load_model(tmp_path / "fp8", context(), dtype="float32", quantize="stored")
    assert packed.parameters["layers.0.mlp.up_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
    for one in packed.kept:
        weight = one.form.assemble({suffix: packed.parameters[one.weight.name + suffix] for suffix in ("", "_scale")})
        array = np.asarray(weight.dequantize())
        np.testing.assert_array_equal(array, np.asarray(expected.parameters[one.weight.name]).reshape(array.shape))
    again, direct = (
        load_model(tmp_path / name, context(), dtype="float32", quantize=OPTIONS["int4"]) for name in ("fp8", "plain")
    )
    same(again.parameters, direct.parameters)


def test_group_sizes_that_do_not_divide_are_refused(small):
    with pytest.raises(UsageError, match=r"groups of 48 .*do not divide these weights.*\n  - layers.0.*64 in-features"):
        load_model(small("qwen3"), context(), dtype="float32", quantize=QuantizeOptions("int4", 48))
    with pytest.raises(UsageError, match="is 31; it must be an even number"):
        QuantizeOptions.of("int4", 31)
    with pytest.raises(UsageError, match="--quantize-group-size 32 needs --quantize int8, int4, fp8; it is stored"):
        QuantizeOptions.of("stored", 32)


@pytest.mark.parametrize("quantize", mostly_slow(["int8", "int4", "fp8"], ["int4"]))
def test_a_quantised_model_answers(tiny_directory, quantize):
    directory = tiny_directory("qwen3", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
    group = None if quantize == "fp8" else 32
    answers = []
    for load_format in ("safetensors", "dummy"):
        llm = LLM(
            str(directory),
            dtype="float32",
            quantize=quantize,
            quantize_group_size=group,
            load_format=load_format,
            max_batch_size=2,
        )
        answers.append(llm.generate(["the quick brown", "fox"], max_new_tokens=3))
    assert all(answer.token_ids for answer in answers[0])
