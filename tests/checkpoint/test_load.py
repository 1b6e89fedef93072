"""The streamed load gives the same bits as safetensors.numpy, on every mesh, dtype and memory budget."""

import jax
import ml_dtypes  # noqa: F401 - numpy learns bfloat16
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qwen_dist.checkpoint import load as loading
from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.source import open_checkpoint

EMBED, HEADS, HEAD_DIM, MLP, EXPERTS, VOCAB = 64, 8, 16, 96, 4, 250


@pytest.fixture
def checkpoint_dir(tmp_path):
    rng = np.random.default_rng(0)

    def make(*shape, dtype="bfloat16"):
        return rng.standard_normal(shape).astype(dtype)

    tensors = {"model.embed_tokens.weight": make(VOCAB, EMBED), "model.norm.weight": make(EMBED, dtype="float32")}
    for layer in range(2):
        start = f"model.layers.{layer}."
        tensors |= {
            start + "self_attn.q_proj.weight": make(HEADS * HEAD_DIM, EMBED),
            start + "self_attn.q_proj.bias": make(HEADS * HEAD_DIM),
            start + "self_attn.o_proj.weight": make(EMBED, HEADS * HEAD_DIM),
            start + "input_layernorm.weight": make(EMBED),
        }
        for expert in range(EXPERTS):
            tensors[f"{start}mlp.experts.{expert}.gate_proj.weight"] = make(MLP, EMBED)
            tensors[f"{start}mlp.experts.{expert}.up_proj.weight"] = make(MLP, EMBED)
            tensors[f"{start}mlp.experts.{expert}.down_proj.weight"] = make(EMBED, MLP)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return tmp_path


def expected_arrays(folder):
    raw = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays = {}
    for name, value in raw.items():
        name = name.removeprefix("model.")
        if ".experts." not in name:
            arrays[name] = value
    for layer in range(2):
        start = f"layers.{layer}.mlp.experts."
        for kind in ("gate_proj", "up_proj", "down_proj"):
            parts = [raw[f"model.{start}{e}.{kind}.weight"] for e in range(EXPERTS)]
            arrays[start + kind] = np.stack(parts)
        attention = f"layers.{layer}.self_attn."
        arrays[attention + "q_proj.weight"] = arrays[attention + "q_proj.weight"].reshape(HEADS, HEAD_DIM, EMBED)
        arrays[attention + "q_proj.bias"] = arrays[attention + "q_proj.bias"].reshape(HEADS, HEAD_DIM)
        arrays[attention + "o_proj.weight"] = arrays[attention + "o_proj.weight"].reshape(EMBED, HEADS, HEAD_DIM)
    return arrays


DISK_SHAPES = {
    f"layers.{layer}.self_attn.{name}": shape
    for layer in range(2)
    for name, shape in {
        "q_proj.weight": (HEADS * HEAD_DIM, EMBED),
        "q_proj.bias": (HEADS * HEAD_DIM,),
        "o_proj.weight": (EMBED, HEADS * HEAD_DIM),
    }.items()
}


def spec(name, row, column):
    """Rows of the matrix over `row`, columns over `column`, heads over the axis of their matrix dimension."""
    if name.endswith("q_proj.weight"):
        return PartitionSpec(row, None, column)
    if name.endswith("q_proj.bias"):
        return PartitionSpec(row, None)
    if name.endswith("o_proj.weight"):
        return PartitionSpec(row, column, None)
    if ".experts." in name:
        return PartitionSpec(None, row, column)
    return PartitionSpec(None, column) if name == "embed_tokens.weight" else PartitionSpec()


MESHES = [
    ((1, 1), "row", None),
    ((8, 1), "row", None),
    ((8, 1), None, "row"),
    ((4, 2), "row", "column"),
    ((2, 4), "row", "column"),
    ((2, 4), None, "column"),
    ((2, 4), None, None),
    ((2, 2), ("row", "column"), None),
]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("long_run", [16, loading.MAX_HOST_PIECE_BYTES])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("mesh_shape", "row", "column"), MESHES)
def test_equals_safetensors_on_every_mesh(checkpoint_dir, monkeypatch, mesh_shape, row, column, dtype, long_run, on_device):
    if on_device:
        monkeypatch.setattr(loading, "make_sinks", lambda p: [loading.DeviceSink(p, shard) for shard in p.shards])
    monkeypatch.setattr("qwen_dist.checkpoint.plan.LONG_RUN_BYTES", long_run)
    monkeypatch.setattr(loading, "MAX_HOST_PIECE_BYTES", 1000)
    mesh = jax.make_mesh(mesh_shape, ("row", "column"), devices=jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    expected = expected_arrays(checkpoint_dir)
    target = {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=NamedSharding(mesh, spec(name, row, column)))
        for name, value in expected.items()
    }
    arrays = load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)
    assert sorted(arrays) == sorted(expected)
    for name, value in expected.items():
        assert arrays[name].sharding == target[name].sharding
        np.testing.assert_array_equal(np.asarray(arrays[name]), value.astype(dtype), strict=True)
        for shard in arrays[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value.astype(dtype)[shard.index])


def test_single_device_sharding(checkpoint_dir):
    expected = expected_arrays(checkpoint_dir)
    device = SingleDeviceSharding(jax.devices()[3])
    target = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device) for name, value in expected.items()}
    arrays = load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), value, strict=True)
