"""Block-wise FP8: every element is multiplied by the scale of its block, on any mesh, for reshaped heads and experts."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen_dist.checkpoint import load as loading
from qwen_dist.checkpoint.load import load, make_load_plan
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError

BLOCK = (16, 8)
CONFIG = {
    "model_type": "qwen3",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
}
# HEADS * HEAD_DIM = 48 is 3 blocks, but heads do not end where blocks end; 40 and 72 are not multiples of 16.
EMBED, HEADS, HEAD_DIM, MLP, EXPERTS = 40, 4, 12, 72, 2


def quantized(rng, *shape, scale_dtype="float32"):
    """Return random FP8 values, their scales, and the product computed element by element."""
    values = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    blocks = (-(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1]))
    scales = rng.uniform(0.5, 2, (*shape[:-2], *blocks)).astype(scale_dtype)
    product = np.empty(shape, "float32")
    for index in np.ndindex(shape):
        scale = scales[(*index[:-2], index[-2] // BLOCK[0], index[-1] // BLOCK[1])]
        product[index] = np.float32(values[index]) * np.float32(scale)
    return values, scales, product


@pytest.fixture(scope="module")
def made():
    """Tensors on disk, expected parameters, and shapes on disk."""
    rng = np.random.default_rng(0)
    disk, expected, shapes = {}, {}, {}

    def add(name, shape, view, scale_dtype="float32"):
        values, scales, product = quantized(rng, *shape, scale_dtype=scale_dtype)
        disk["model." + name], disk["model." + name + "_scale_inv"] = values, scales
        expected[name], shapes[name] = product.reshape(view), shape

    add("layers.0.self_attn.q_proj.weight", (HEADS * HEAD_DIM, EMBED), (HEADS, HEAD_DIM, EMBED))
    add("layers.0.self_attn.o_proj.weight", (EMBED, HEADS * HEAD_DIM), (EMBED, HEADS, HEAD_DIM), "bfloat16")
    add("layers.0.mlp.up_proj.weight", (MLP, EMBED), (MLP, EMBED))
    norm = rng.standard_normal(EMBED).astype("bfloat16")
    disk["model.norm.weight"], expected["norm.weight"] = norm, norm
    experts = {}
    for kind, shape in {"gate_proj": (MLP, EMBED), "up_proj": (MLP, EMBED), "down_proj": (EMBED, MLP)}.items():
        for expert in range(EXPERTS):
            name = f"model.layers.1.mlp.experts.{expert}.{kind}.weight"
            disk[name], disk[name + "_scale_inv"], experts[kind, expert] = quantized(rng, *shape)
        expected[f"layers.1.mlp.experts.{kind}"] = np.stack([experts[kind, expert] for expert in range(EXPERTS)])
    return disk, expected, shapes


def check(folder, expected, shapes, row, column, dtype):
    mesh = jax.make_mesh((2, 2), ("row", "column"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def spec(name, rank):
        if rank == 1:
            return PartitionSpec()
        if ".experts." in name:
            return PartitionSpec(None, row, column)
        return PartitionSpec(row, column) if "o_proj" in name or rank == 2 else PartitionSpec(row, None, column)

    target = {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=NamedSharding(mesh, spec(name, value.ndim)))
        for name, value in expected.items()
    }
    checkpoint = open_checkpoint(folder)
    arrays = load(checkpoint, target, disk_shapes=shapes)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), value.astype(dtype), strict=True)
    return make_load_plan(checkpoint, target, disk_shapes=shapes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("row", "column"), [(None, None), ("row", None), (None, "column"), ("row", "column")])
def test_dequantised_on_every_mesh(write_checkpoint, monkeypatch, made, row, column, dtype):
    """Scales are in another file than their weights, and chunks end in the middle of blocks."""
    disk, expected, shapes = made
    scales = {name: value for name, value in disk.items() if name.endswith("_scale_inv")}
    weights = {name: value for name, value in disk.items() if name not in scales}
    folder = write_checkpoint({"1.safetensors": weights, "2.safetensors": scales}, CONFIG)
    monkeypatch.setattr(loading, "MAX_HOST_CHUNK_BYTES", 3000)
    check(folder, expected, shapes, row, column, dtype)


def test_dequantised_after_the_transfer(write_checkpoint, monkeypatch, made):
    disk, expected, shapes = made
    folder = write_checkpoint({"model.safetensors": disk}, CONFIG)
    monkeypatch.setattr(loading, "is_on_host", lambda parameter: False)
    monkeypatch.setattr("qwen_dist.checkpoint.buffers.is_on_host", lambda parameter: False)
    plan = check(folder, expected, shapes, None, "column", "bfloat16")
    assert plan.bytes_read <= 1.05 * sum(value.nbytes for value in disk.values())


def test_fused_experts(write_checkpoint, made):
    """[E, 2F, D] with scales [E, ..., ...], loaded as two halves and as a whole."""
    rng = np.random.default_rng(1)
    values, scales, product = quantized(rng, 3, 2 * MLP, EMBED)
    down, down_scales, down_product = quantized(rng, 3, EMBED, MLP)
    name = "layers.0.mlp.experts."
    disk = {
        f"model.{name}gate_up_proj": values, f"model.{name}gate_up_proj_scale_inv": scales,
        f"model.{name}down_proj": down, f"model.{name}down_proj_scale_inv": down_scales,
    }  # fmt: skip
    folder = write_checkpoint({"model.safetensors": disk}, CONFIG)
    halves = {"gate_proj": product[:, :MLP], "up_proj": product[:, MLP:], "down_proj": down_product}
    check(folder, {name + kind: value for kind, value in halves.items()}, {}, "row", "column", "float32")
    whole = {f"{name}gate_up_proj": product.reshape(3, 2, MLP, EMBED), f"{name}down_proj": down_product}
    shapes = {f"{name}gate_up_proj": values.shape}
    target_rows = {key: value for key, value in whole.items()}
    mesh = jax.make_mesh((2,), ("row",), (AxisType.Auto,), devices=jax.devices()[:2])
    target = {
        key: jax.ShapeDtypeStruct(
            value.shape,
            "float32",
            sharding=NamedSharding(mesh, PartitionSpec(*[None] * (value.ndim - 2), "row", None)),
        )
        for key, value in target_rows.items()
    }
    arrays = load(open_checkpoint(folder), target, disk_shapes=shapes)
    for key, value in whole.items():
        np.testing.assert_array_equal(np.asarray(arrays[key]), value)


@pytest.mark.parity
def test_equals_transformers(write_checkpoint):
    """The result equals that of the dequantisation in transformers."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(2)
    values, scales, _ = quantized(rng, 32, 40)
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scales)
    )
    disk = {"model.up_proj.weight": values, "model.up_proj.weight_scale_inv": scales}
    folder = write_checkpoint({"model.safetensors": disk}, CONFIG)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"up_proj.weight": jax.ShapeDtypeStruct(values.shape, "float32", sharding=device)}
    ours = load(open_checkpoint(folder), target)["up_proj.weight"]
    np.testing.assert_array_equal(np.asarray(ours), theirs.float().numpy())


W, S = np.ones((20, 20), ml_dtypes.float8_e4m3fn), np.ones((2, 3), "float32")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, {"w": W}, "quantization 'hqq' is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"w": W},
            "weight_block_size as two positive integers, found None",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 8]}}, {"w": W}, r"found \[0, 8\]"),
        (CONFIG, {"w": W}, "its weight_scale_inv is missing"),
        (CONFIG, {"w": W, "w_scale_inv": S[:1]}, r"F32 \[1, 3\]; blocks of \[16, 8\] over \[20, 20\] need \[2, 3\]"),
        (CONFIG, {"w": W, "w_scale_inv": S.astype("int32")}, r"I32 \[2, 3\]"),
        (CONFIG, {"w": W.astype("bfloat16"), "w_scale_inv": S}, "w_scale_inv would go unused: the weight is BF16"),
        (CONFIG, {"w": W, "w_scale_inv": S, "v_scale_inv": S}, "unexpected: model.v_scale_inv"),
        ({}, {"w": W, "w_scale_inv": S}, "config.json has no quantization_config"),
    ],
)
def test_refused(write_checkpoint, config, tensors, message):
    folder = write_checkpoint(
        {"model.safetensors": {"model." + key: value for key, value in tensors.items()}}, config or {"a": 1}
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CheckpointError, match=message):
        load(open_checkpoint(folder), {"w": jax.ShapeDtypeStruct((20, 20), "float32", sharding=device)})
