"""Hybrid checkpoints: sections, layouts by group, dtypes of their own, FP8, and what the text model does not use."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.model import abstract_model, export_model, load_model
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.hf_config import read_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import DiskShape, from_disk, on_disk
from qwen_dist.sharding import INFERENCE, ShardingContext

MESHES = ["", "tensor=2", "fsdp=2,tensor=2", "expert=2,data=2"]
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 8, "intermediate_size": 48,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


def context(mesh):
    return ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)


def stored(directory):
    return {name: array for path in directory.glob("*.safetensors") for name, array in load_file(path).items()}


def store(directory, tensors):
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function (is_mixture) -> checkpoint in the form of Qwen's own: multimodal, bfloat16, with float32 tensors and a
    layer for multi-token prediction whose experts are stored in the other way than the body's."""

    def make(is_mixture):
        torch.manual_seed(0)
        kind = "Qwen3_5Moe" if is_mixture else "Qwen3_5"
        text = getattr(transformers, f"{kind}TextConfig")(**TEXT | (EXPERTS if is_mixture else {}))
        config = getattr(transformers, f"{kind}Config")(
            text_config=text.to_dict() | {"dtype": "bfloat16"}, vision_config=VISION
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).to(torch.bfloat16)
        directory = tmp_path_factory.mktemp("published")
        model.save_pretrained(directory)
        rng, tensors = np.random.default_rng(0), stored(directory)
        assert any(name.startswith("model.visual.") for name in tensors)
        for name, array in tensors.items():
            is_wide = name.endswith(("A_log", "linear_attn.norm.weight"))
            tensors[name] = rng.normal(0.1, 0.5, array.shape).astype(np.float32 if is_wide else ml_dtypes.bfloat16)
        fused = {"mtp.layers.0.mlp.experts.gate_up_proj": (4, 48, 32), "mtp.layers.0.mlp.experts.down_proj": (4, 32, 24)}
        for name, shape in ({"mtp.fc.weight": (32, 64), "mtp.norm.weight": (32,)} | (fused if is_mixture else {})).items():
            tensors[name] = rng.normal(0, 1, shape).astype(ml_dtypes.bfloat16)
        store(directory, tensors)
        return directory

    return functools.cache(make)


def fuse_experts(tensors, group):
    """Store the experts of a layer as one tensor for each projection."""
    fused, by_kind = dict(tensors), {}
    for kind in ("gate", "up", "down"):
        by_kind[kind] = np.stack([fused.pop(f"{group}.{expert}.{kind}_proj.weight") for expert in range(4)])
    fused[f"{group}.gate_up_proj"] = np.concatenate([by_kind["gate"], by_kind["up"]], axis=1)
    return fused | {f"{group}.down_proj": by_kind["down"]}


def assert_same_tensors(directory, tensors):
    found = stored(directory)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3))
def test_sections_are_undone(heads, sections, columns):
    size = np.gcd.reduce(sections)
    rows = np.arange(heads * sum(sections) * columns).reshape(-1, columns)
    disk_shape, shape = DiskShape(rows.shape, tuple(sections)), (heads, sum(sections) // size, size, columns)
    memory = from_disk(rows, disk_shape, shape)
    assert memory.shape == shape and np.array_equal(on_disk(memory, disk_shape), rows)
    assert np.array_equal(on_disk(jax.numpy.asarray(memory), disk_shape), rows)
    starts = heads * np.concatenate([[0], np.cumsum(sections)[:-1]])
    of_last = [rows[start + (heads - 1) * n : start + heads * n] for start, n in zip(starts, sections, strict=True)]
    assert np.array_equal(memory[-1].reshape(-1, columns), np.concatenate(of_last))


@pytest.mark.parametrize("is_mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("mesh", MESHES)
def test_an_export_has_every_tensor_as_it_was(published, tmp_path, is_mixture, mesh):
    directory = published(is_mixture)
    export_model(str(directory), context(mesh), str(tmp_path / "out"), max_shard_bytes=20_000)
    assert_same_tensors(tmp_path / "out", stored(directory))
    given, written = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "out"))
    assert written == given


def test_layers_whose_experts_are_stored_in_different_ways(published, tmp_path):
    directory = published(True)
    one_by_one = load_model(directory, context(""), dtype="bfloat16").parameters
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "config.json").write_bytes((directory / "config.json").read_bytes())
    tensors = stored(directory)
    for layer in (0, 2):
        tensors = fuse_experts(tensors, f"model.language_model.layers.{layer}.mlp.experts")
    store(mixed, tensors)
    loaded = load_model(mixed, context("expert=2"), dtype="bfloat16").parameters
    for name, value in one_by_one.items():
        assert np.array_equal(np.asarray(value), np.asarray(loaded[name])), name
    export_model(str(mixed), context("tensor=2"), str(tmp_path / "out"), max_shard_bytes=10**9)
    assert_same_tensors(tmp_path / "out", stored(mixed))


def test_a_dtype_that_is_asked_for(published, tmp_path):
    directory = published(False)
    export_model(str(directory), context(""), str(tmp_path / "out"), dtype="float16", max_shard_bytes=10**9)
    for name, array in stored(directory).items():
        found = stored(tmp_path / "out")[name]
        # A delta net's float32 tensors are not narrowed, and what the text model does not use keeps its dtype.
        is_kept = array.dtype == np.float32 or name.startswith(("mtp.", "model.visual."))
        assert found.dtype == (array.dtype if is_kept else np.float16), name
        assert np.array_equal(found, array.astype(found.dtype)), name


@pytest.mark.parametrize("mesh", ["", "tensor=2", "fsdp=2"])
def test_fp8_in_sections(published, tmp_path, mesh):
    """Block scales belong to the rows on disk, wherever these are in memory."""
    directory = published(False)
    rng, tensors = np.random.default_rng(1), stored(directory)
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith(("in_proj_qkv.weight", "in_proj_z.weight", "q_proj.weight"))]:
        values = tensors[name].astype(np.float32)
        scale = rng.uniform(0.5, 2, [-(-size // 16) for size in values.shape]).astype(np.float32)
        wide = np.kron(scale, np.ones((16, 16), np.float32))[: values.shape[0], : values.shape[1]]
        tensors[name], tensors[f"{name}_scale_inv"] = values.astype(ml_dtypes.float8_e4m3fn), scale
        expected[name] = (tensors[name].astype(np.float32) * wide).astype(ml_dtypes.bfloat16)
    hf = json.loads((directory / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    quantised = tmp_path / "fp8"
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps(hf))
    store(quantised, tensors)
    export_model(str(quantised), context(mesh), str(tmp_path / "out"), max_shard_bytes=10**9)
    assert_same_tensors(tmp_path / "out", expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_flat_file_of_a_multimodal_model(published, tmp_path):
    """transformers writes a flat config.json with the multimodal names when it opens the file as a text model."""
    directory = published(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "flat")
    assert "text_config" not in json.loads((tmp_path / "flat" / "config.json").read_text())
    nested, flat = (load_model(path, context(""), dtype="bfloat16").parameters for path in (directory, tmp_path / "flat"))
    for name, value in nested.items():
        wide = np.asarray(value).astype(np.float32)  # transformers rounds the float32 tensors
        assert np.allclose(wide, np.asarray(flat[name]).astype(np.float32), rtol=2**-8), name
    assert read_model_config(tmp_path / "flat") == read_model_config(directory)


def test_no_process_reads_more_than_its_share(published):
    """Of sections, too, a device reads the rows of its own heads only."""
    from qwen_dist.checkpoint.load import make_load_plan

    checkpoint = open_checkpoint(published(False))
    model = abstract_model(checkpoint, context("tensor=2"), "bfloat16")
    plan = make_load_plan(checkpoint, model.target, disk_shapes=model.disk_shapes, tied=model.is_tied)
    assert plan.bytes_read == plan.bytes_needed
    assert set(load(checkpoint, model.target, disk_shapes=model.disk_shapes, tied=model.is_tied)) == set(model.target)
