"""A saved checkpoint reads back bit for bit, here and in transformers; a killed save leaves the old or the new one."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from qwen_dist.checkpoint import load as loading
from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.model import export_model
from qwen_dist.checkpoint.names import find_layout, group_names
from qwen_dist.checkpoint.safetensors import DATA_ALIGNMENT
from qwen_dist.checkpoint.save import export, save
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.sharding import INFERENCE, ShardingContext


def target_of(checkpoint, mesh=None, row=None, column=None, dtype=None):
    """Return a target for a whole checkpoint, with stacked experts and sharded matrices, as its model would."""
    prefix = find_layout(["embed_tokens.weight"], checkpoint.tensors).prefix
    target = {}
    for names in group_names(checkpoint.tensors).values():
        for name in names:
            info = checkpoint.tensors[name]
            short, shape = name.removeprefix(prefix[0]), info.shape
            if match := re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", short):
                short, shape = match[1] + match[3], (sum(match[1] in other for other in checkpoint.tensors) // 3, *shape)
            axes = [*[None] * (len(shape) - 2), row, column] if len(shape) > 1 else []
            spec = PartitionSpec(*(None if size % 8 else axis for size, axis in zip(shape, axes, strict=False)))
            sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)
            target[short] = jax.ShapeDtypeStruct(shape, dtype or info.dtype.numpy, sharding=sharding)
    return target


def contents(folder):
    """Read every tensor of a directory with the safetensors library."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, info in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            found[name] = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return found


@pytest.fixture
def checkpoint_dir(write_checkpoint):
    rng = np.random.default_rng(0)

    def make(*shape, dtype="bfloat16"):
        return rng.standard_normal(shape).astype(dtype)

    tensors = {f"model.layers.{i}.mlp.up_proj.weight": make(24, 40) for i in range(12)}
    tensors |= {f"model.layers.{i}.norm.weight": make(40, dtype="float32") for i in range(12)}
    tensors["model.embed_tokens.weight"] = make(1000, 40)
    tensors |= {
        f"model.layers.0.mlp.experts.{e}.{kind}.weight": make(8, 40) for e in range(12) for kind in ("gate_proj", "up_proj")
    }
    tensors |= {f"model.layers.0.mlp.experts.{e}.down_proj.weight": make(40, 8) for e in range(12)}
    folder = write_checkpoint({"model.safetensors": tensors}, {"model_type": "qwen3_moe", "torch_dtype": "float16"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


MESHES = [None, ((8, 1), "row", None), ((4, 2), None, "row"), ((2, 4), "row", "column"), ((2, 2), None, None)]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
@pytest.mark.parametrize("mesh", MESHES)
def test_round_trip_is_bit_equal(checkpoint_dir, tmp_path, monkeypatch, mesh, max_shard_bytes):
    monkeypatch.setattr(loading, "MAX_HOST_CHUNK_BYTES", 1000)
    checkpoint = open_checkpoint(checkpoint_dir)
    if mesh is None:
        target = target_of(checkpoint)
    else:
        devices = jax.devices()[: mesh[0][0] * mesh[0][1]]
        made = jax.make_mesh(mesh[0], ("row", "column"), (AxisType.Auto,) * 2, devices=devices)
        target = target_of(checkpoint, made, *mesh[1:])
    output = tmp_path / "saved"
    export(checkpoint, load(checkpoint, target), output, max_shard_bytes=max_shard_bytes)
    assert contents(output) == contents(checkpoint_dir)
    again = open_checkpoint(output)
    assert not again.warnings
    assert all(info.begin % info.dtype.numpy.itemsize == 0 for info in again.tensors.values())
    assert {min(t.begin for t in again.tensors.values() if t.file == file) % DATA_ALIGNMENT for file in again.files} == {0}
    assert (output / "tokenizer.json").read_text() == "{}"
    assert json.loads((output / "config.json").read_text()) == {"model_type": "qwen3_moe", "torch_dtype": "bfloat16"}
    sizes = {file: sum(t.nbytes for t in again.tensors.values() if t.file == file) for file in again.files}
    assert all(
        size <= max_shard_bytes or sum(t.file == file for t in again.tensors.values()) == 1 for file, size in sizes.items()
    )
    assert list(output.parent.iterdir()).count(output) == 1 and not list(output.parent.glob(".*"))


def test_saved_through_transfers(checkpoint_dir, tmp_path, monkeypatch):
    """As from accelerators: only the needed part of a shard leaves the device."""
    monkeypatch.setattr("qwen_dist.checkpoint.save.is_on_host", lambda parameter: False)
    monkeypatch.setattr(loading, "is_on_host", lambda parameter: False)
    monkeypatch.setattr("qwen_dist.checkpoint.buffers.is_on_host", lambda parameter: False)
    mesh = jax.make_mesh((2,), ("row",), (AxisType.Auto,), devices=jax.devices()[:2])
    checkpoint = open_checkpoint(checkpoint_dir)
    export(checkpoint, load(checkpoint, target_of(checkpoint, mesh, None, "row")), tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(checkpoint_dir)


def test_saved_in_another_dtype(checkpoint_dir, tmp_path):
    checkpoint = open_checkpoint(checkpoint_dir)
    arrays = load(checkpoint, target_of(checkpoint))
    export(checkpoint, arrays, tmp_path / "saved", dtypes=dict.fromkeys(arrays, np.dtype("float16")))
    again = open_checkpoint(tmp_path / "saved")
    assert {info.dtype.name for info in again.tensors.values()} == {"F16"}
    loaded = load(again, target_of(again))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(array).astype("float16"))
    assert again.config["torch_dtype"] == "float16"


@pytest.mark.fault
def test_nothing_is_overwritten_by_default(checkpoint_dir, tmp_path):
    checkpoint = open_checkpoint(checkpoint_dir)
    arrays = load(checkpoint, target_of(checkpoint))
    before = contents(checkpoint_dir)
    with pytest.raises(CheckpointError, match="exists; choose another output"):
        export(checkpoint, arrays, checkpoint_dir)
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    with pytest.raises(CheckpointError, match="is not a checkpoint directory and will not be replaced"):
        export(checkpoint, arrays, other, overwrite=True)
    assert contents(checkpoint_dir) == before and (other / "diary.txt").exists()
    export(checkpoint, arrays, checkpoint_dir, overwrite=True)
    assert contents(checkpoint_dir) == before


@pytest.mark.fault
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_disk_leaves_the_old_checkpoint(checkpoint_dir, monkeypatch, number):
    checkpoint = open_checkpoint(checkpoint_dir)
    arrays = load(checkpoint, target_of(checkpoint))
    before = {path.name: path.read_bytes() for path in checkpoint_dir.iterdir()}
    whole, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(number, os.strerror(number))
        return whole(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match=f"cannot be written: {os.strerror(number)}"):
        export(checkpoint, arrays, checkpoint_dir, overwrite=True)
    assert {path.name: path.read_bytes() for path in checkpoint_dir.iterdir()} == before
    assert [path.name for path in checkpoint_dir.parent.iterdir()] == [checkpoint_dir.name]


@pytest.mark.fault
def test_file_systems_that_cannot_exchange(checkpoint_dir, monkeypatch):
    checkpoint = open_checkpoint(checkpoint_dir)
    arrays = load(checkpoint, target_of(checkpoint))
    before = contents(checkpoint_dir)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    with pytest.raises(CheckpointError, match="cannot be replaced in one step on this file system"):
        export(checkpoint, arrays, checkpoint_dir, overwrite=True)
    assert contents(checkpoint_dir) == before


def test_short_writes_are_continued(checkpoint_dir, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(checkpoint_dir)
    arrays = load(checkpoint, target_of(checkpoint))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:777], offset))
    export(checkpoint, arrays, tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(checkpoint_dir)


@pytest.mark.fault
def test_killed_at_any_moment_leaves_old_or_new(tmp_path):
    """Kill a process that keeps replacing a checkpoint, 30 times; each time the directory is complete."""
    output = tmp_path / "saved"
    arrays = {name: jax.device_put(np.ones(shape, "float32")) for name, shape in SAVED_SHAPES.items()}
    save(arrays, output, config={"value": 1}, extra_files={"tokenizer.json": b"1"}, max_shard_bytes=300_000)
    script = Path(__file__).with_name("save_worker.py")
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", script, output],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )
    rng = np.random.default_rng(0)
    seen = set()
    try:
        for _ in range(30):
            worker.stdin.write(b"go\n")
            worker.stdin.flush()
            lines = [worker.stdout.readline(), worker.stdout.readline()]
            assert b"saving\n" in lines, lines
            time.sleep(rng.uniform(0, 0.25))
            os.kill(int(next(line for line in lines if line != b"saving\n")), signal.SIGKILL)
            assert worker.stdout.readline() == b"gone\n"
            seen.add(check_whole(output))
    finally:
        worker.kill()
        worker.wait()
    assert seen == {1, 2}
    save(arrays, output, config={"value": 1}, extra_files={"tokenizer.json": b"1"}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


SAVED_SHAPES = {"embed_tokens.weight": (4000, 64), "layers.0.mlp.up_proj.weight": (1000, 64), "norm.weight": (64,)}


def check_whole(output):
    checkpoint = open_checkpoint(output)
    value = checkpoint.config["value"]
    assert (output / "tokenizer.json").read_bytes() == b"%d" % value
    arrays = load(checkpoint, target_of(checkpoint))
    assert {name: array.shape for name, array in arrays.items()} == SAVED_SHAPES
    assert all((np.asarray(array) == value).all() for array in arrays.values())
    return value


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EXPERT_KEYS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
DELTA_KEYS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
FAMILIES = {
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERT_KEYS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERT_KEYS),
    "qwen3_next": ("Qwen3NextConfig", EXPERT_KEYS | DELTA_KEYS | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", DELTA_KEYS),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", EXPERT_KEYS | DELTA_KEYS | {"shared_expert_intermediate_size": 16}),
}


@pytest.mark.parity
@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_saved(tmp_path, family, mesh_shape):
    """A model made by transformers, loaded onto a mesh and saved, gives identical logits in transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, keys = FAMILIES[family]
    config = getattr(transformers, name)(**TINY | keys)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "made")
    checkpoint = open_checkpoint(tmp_path / "made")
    mesh = jax.make_mesh(mesh_shape, ("row", "column"), (AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(mesh_shape)])
    arrays = load(checkpoint, target_of(checkpoint, mesh, "row", "column"))
    export(checkpoint, arrays, tmp_path / "saved", max_shard_bytes=20_000)
    assert contents(tmp_path / "saved") == contents(tmp_path / "made")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert again.dtype == torch.bfloat16
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_float16_is_kept_and_written(tiny_checkpoint, tmp_path):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    model.half().save_pretrained(tmp_path / "half")
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse("fsdp=2")), INFERENCE)
    for source, dtype in (("half", None), ("wide", "float16")):
        output = tmp_path / f"from {source}"
        export_model(str(tmp_path / source), sharding_ctx, str(output), dtype=dtype, max_shard_bytes=10**9)
        assert contents(output) == contents(tmp_path / "half")
        assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
