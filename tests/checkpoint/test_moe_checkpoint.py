"""Experts are one tensor each on disk and stacked and sharded over devices in memory; export restores the tensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_dist.checkpoint.model import export_model, load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.sharding import INFERENCE, ShardingContext

SIZES = {"num_experts": 8, "vocab_size": 320}


@pytest.fixture
def sharding_ctx():
    return ShardingContext(make_mesh(MeshConfig.parse("expert=4,tensor=2")), INFERENCE)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_experts_are_stacked_and_sharded(tiny_checkpoint, sharding_ctx, family):
    directory = tiny_checkpoint(family, **SIZES)
    stored = load_file(directory / "model.safetensors")
    parameters = load_model(directory, sharding_ctx, dtype="float32").parameters
    layer = 0 if family == "qwen2_moe" else 1  # mlp_only_layers, decoder_sparse_step
    experts = f"layers.{layer}.mlp.experts."
    stacked = parameters[experts + "gate_up_proj"]
    for expert in range(SIZES["num_experts"]):
        for index, kind in enumerate(("gate_proj", "up_proj")):
            np.testing.assert_array_equal(stacked[expert, index], stored[f"model.{experts}{expert}.{kind}.weight"])
        down = parameters[experts + "down_proj"][expert]
        np.testing.assert_array_equal(down, stored[f"model.{experts}{expert}.down_proj.weight"])
    one_eighth = (2, 2, stacked.shape[2] // 2, stacked.shape[3])  # a quarter of the experts, half of their channels
    assert {shard.data.shape for shard in stacked.addressable_shards} == {one_eighth}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_export_restores_every_experts_tensors_bit_for_bit(tiny_checkpoint, sharding_ctx, family, tmp_path):
    directory = tiny_checkpoint(family, **SIZES)
    export_model(str(directory), sharding_ctx, str(tmp_path / "new"), max_shard_bytes=50_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "new" / name) for name in set(index["weight_map"].values())}
    before = load_file(directory / "model.safetensors")
    assert index["weight_map"].keys() == before.keys()
    for name, values in before.items():
        after = files[index["weight_map"][name]][name]
        assert after.dtype == values.dtype
        np.testing.assert_array_equal(after, values)
