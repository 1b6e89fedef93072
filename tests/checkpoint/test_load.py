"""The streamed load gives the same bits as safetensors.numpy for every mesh, dtype and memory budget."""

import io
import itertools
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from rich.console import Console

from qwen_dist.checkpoint import load as loading
from qwen_dist.checkpoint.buffers import BUFFER_ALIGNMENT
from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.progress import progress_bar
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError
from qwen_dist.storage.files import LocalFile

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
            arrays[start + kind] = np.stack([raw[f"model.{start}{e}.{kind}.weight"] for e in range(EXPERTS)])
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
    """Shard matrix rows over `row` and columns over `column`; heads use the axis of their matrix dimension."""
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


def check_load(folder, mesh, row, column, dtype):
    expected = expected_arrays(folder)
    target = {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=NamedSharding(mesh, spec(name, row, column)))
        for name, value in expected.items()
    }
    arrays = load(open_checkpoint(folder), target, disk_shapes=DISK_SHAPES)
    assert sorted(arrays) == sorted(expected)
    for name, value in expected.items():
        assert arrays[name].sharding == target[name].sharding
        np.testing.assert_array_equal(np.asarray(arrays[name]), value.astype(dtype), strict=True)
        for shard in arrays[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value.astype(dtype)[shard.index])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("long_run", [16, loading.MAX_HOST_CHUNK_BYTES])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("mesh_shape", "row", "column"), MESHES)
def test_equals_safetensors_on_every_mesh(checkpoint_dir, monkeypatch, mesh_shape, row, column, dtype, long_run, axis_type):
    """`long_run` selects whether shards are read directly into place or as rows divided in memory; chunks are tiny."""
    monkeypatch.setattr("qwen_dist.checkpoint.plan.LONG_RUN_BYTES", long_run)
    monkeypatch.setattr(loading, "MAX_HOST_CHUNK_BYTES", 1000)
    devices = jax.devices()[: mesh_shape[0] * mesh_shape[1]]
    mesh = jax.make_mesh(mesh_shape, ("row", "column"), (axis_type,) * 2, devices=devices)
    check_load(checkpoint_dir, mesh, row, column, dtype)


@pytest.fixture
def as_accelerators(monkeypatch):
    """Load with transfers and in-place updates, as for devices with separate memory."""
    monkeypatch.setattr(loading, "is_on_host", lambda parameter: False)
    monkeypatch.setattr("qwen_dist.checkpoint.buffers.is_on_host", lambda parameter: False)


@pytest.mark.parametrize("chunk_bytes", [4096, loading.MAX_DEVICE_CHUNK_BYTES])
@pytest.mark.parametrize(("dtype", "row", "column"), [("bfloat16", None, "row"), ("float32", "row", None)])
def test_equals_safetensors_through_transfers(
    checkpoint_dir, monkeypatch, as_accelerators, dtype, row, column, chunk_bytes
):
    """Chunks are smaller than a shard, or whole shards."""
    monkeypatch.setattr(loading, "MAX_DEVICE_CHUNK_BYTES", chunk_bytes)
    mesh = jax.make_mesh((2,), ("row",), (AxisType.Auto,), devices=jax.devices()[:2])
    check_load(checkpoint_dir, mesh, row, column, dtype)


def test_mesh_of_three_axes(checkpoint_dir):
    """Rows over two axes, columns over the third, which is not the innermost."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "column", "b"), (AxisType.Auto,) * 3)
    check_load(checkpoint_dir, mesh, ("b", "a"), "column", "bfloat16")


def test_single_device_sharding(checkpoint_dir):
    expected = expected_arrays(checkpoint_dir)
    device = SingleDeviceSharding(jax.devices()[3])
    target = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device) for name, value in expected.items()}
    arrays = load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), value, strict=True)


def one_device(arrays, dtype=None):
    """Return a target with the shapes of these arrays on one device."""
    device = SingleDeviceSharding(jax.devices()[0])
    return {
        name.removeprefix("model."): jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=device)
        for name, value in arrays.items()
    }


def test_cpu_arrays_adopt_their_buffers(checkpoint_dir):
    """Replicas share one aligned buffer, and later loads do not change it."""
    mesh = jax.make_mesh((4,), ("row",), (AxisType.Auto,), devices=jax.devices()[:4])
    expected = expected_arrays(checkpoint_dir)
    target = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        for name, value in expected.items()
    }
    first = load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)
    for array in first.values():
        pointers = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        assert len(pointers) == 1 and pointers.pop() % BUFFER_ALIGNMENT == 0
    for _ in range(3):
        load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(first[name]), value)


def test_donating_an_adopted_buffer_does_not_change_its_replica(checkpoint_dir):
    mesh = jax.make_mesh((2,), ("row",), (AxisType.Auto,), devices=jax.devices()[:2])
    expected = expected_arrays(checkpoint_dir)
    target = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        for name, value in expected.items()
    }
    array = load(open_checkpoint(checkpoint_dir), target, disk_shapes=DISK_SHAPES)["embed_tokens.weight"]
    one, other = (shard.data for shard in array.addressable_shards)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(one))
    np.testing.assert_array_equal(np.asarray(other), expected["embed_tokens.weight"])


def test_empty_and_scalar_tensors(write_checkpoint):
    arrays = {"model.embed_tokens.weight": np.zeros((0, 4), "float32"), "model.scale": np.array(3, "float32")}
    loaded = load(open_checkpoint(write_checkpoint({"model.safetensors": arrays})), one_device(arrays))
    assert loaded["embed_tokens.weight"].shape == (0, 4) and loaded["scale"] == 3


def test_mixed_dtypes_in_one_file(write_checkpoint):
    rng = np.random.default_rng(0)
    dtypes = ["bfloat16", "float16", "float32", "int32", "uint8", ml_dtypes.float8_e4m3fn]
    arrays = {f"model.x{i}.weight": rng.uniform(0, 9, (7, 3)).astype(dtype) for i, dtype in enumerate(dtypes)}
    loaded = load(open_checkpoint(write_checkpoint({"model.safetensors": arrays})), one_device(arrays))
    for name, value in arrays.items():
        np.testing.assert_array_equal(np.asarray(loaded[name.removeprefix("model.")]), value, strict=True)


@pytest.mark.fault
def test_dtypes_are_never_reinterpreted(write_checkpoint):
    """One message lists all tensors that cannot be converted to the target dtype."""
    arrays = {
        "model.a.weight": np.ones(4, "int32"),
        "model.b.weight": np.ones(4, bool),
        "model.c.weight": np.ones(4, ml_dtypes.float8_e4m3fn),
        "model.d.weight": np.ones(4, "float16"),
    }
    with pytest.raises(CheckpointError) as error:
        load(open_checkpoint(write_checkpoint({"model.safetensors": arrays})), one_device(arrays, "float32"))
    text = str(error.value)
    assert "model.a.weight: dtype I32 on disk is never converted to float32" in text
    assert "model.b.weight: dtype BOOL is known, but loading it is not supported" in text
    assert "model.c.weight: dtype F8_E4M3 on disk is never converted to float32; its weight_scale_inv is missing" in text
    assert "model.d" not in text


@pytest.mark.fault
def test_64_bits_are_not_truncated_silently(write_checkpoint):
    arrays = {"model.a.weight": np.ones(4, "float64")}
    with pytest.raises(CheckpointError, match=r"model\.a\.weight: float64 arrays need jax_enable_x64"):
        load(open_checkpoint(write_checkpoint({"model.safetensors": arrays})), one_device(arrays))


TABLE = np.arange(12, dtype="float32").reshape(3, 4)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("head", "is_equal"), [(TABLE, True), (TABLE + 1, False), (TABLE.astype("float16"), False), (TABLE[:2], False)]
)
def test_stored_head_of_a_tied_model(write_checkpoint, head, is_equal):
    arrays = {"model.embed_tokens.weight": TABLE}
    checkpoint = open_checkpoint(write_checkpoint({"model.safetensors": arrays | {"lm_head.weight": head}}))
    if is_equal:
        assert list(load(checkpoint, one_device(arrays), tied=True)) == ["embed_tokens.weight"]
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight .* and model\.embed_tokens\.weight .* differ"):
            load(checkpoint, one_device(arrays), tied=True)


@pytest.mark.fault
def test_failure_in_one_thread_stops_all(checkpoint_dir, monkeypatch):
    checkpoint, target = open_checkpoint(checkpoint_dir), one_device(expected_arrays(checkpoint_dir))
    monkeypatch.setattr(loading, "MAX_HOST_CHUNK_BYTES", 1000)
    reads = itertools.count()
    whole = LocalFile.read_into

    def fail(self, offset, buffer):
        if next(reads) == 20:
            raise CheckpointError("the disk is gone")
        whole(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", fail)
    planned = len(loading.make_load_plan(checkpoint, target, disk_shapes=DISK_SHAPES).requests)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        load(checkpoint, target, disk_shapes=DISK_SHAPES)
    assert next(reads) < planned
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.fault
def test_interrupt_stops_all(checkpoint_dir, monkeypatch):
    """Ctrl-C during a load stops it and leaves no thread and no open descriptor."""
    checkpoint, target = open_checkpoint(checkpoint_dir), one_device(expected_arrays(checkpoint_dir))
    monkeypatch.setattr(loading, "MAX_HOST_CHUNK_BYTES", 1000)
    descriptors = len(os.listdir("/proc/self/fd"))
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, target, disk_shapes=DISK_SHAPES, progress=progress)
    assert len(calls) < 50
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_progress_counts_every_byte(checkpoint_dir):
    calls = []
    target = one_device(expected_arrays(checkpoint_dir))
    checkpoint = open_checkpoint(checkpoint_dir)
    load(checkpoint, target, disk_shapes=DISK_SHAPES, progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]} and done[-1] == checkpoint.nbytes


def test_progress_bar(checkpoint_dir):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with progress_bar("loading", console) as progress:
        load(
            open_checkpoint(checkpoint_dir),
            one_device(expected_arrays(checkpoint_dir)),
            disk_shapes=DISK_SHAPES,
            progress=progress,
        )
    assert "loading" in out.getvalue() and "kB" in out.getvalue()


@pytest.mark.fault
def test_shards_that_do_not_divide(write_checkpoint, monkeypatch):
    """An uneven sharding is refused, with the parameter's name, before anything is read."""
    arrays = {"model.embed_tokens.weight": np.ones((6, 4), "float32"), "model.k_proj.weight": np.ones((3, 4), "float32")}
    checkpoint = open_checkpoint(write_checkpoint({"model.safetensors": arrays}))
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    target = {
        name.removeprefix("model."): SimpleNamespace(shape=value.shape, dtype=value.dtype, sharding=sharding)
        for name, value in arrays.items()
    }
    monkeypatch.setattr(LocalFile, "read_into", lambda *_: pytest.fail("something was read"))
    with pytest.raises(CheckpointError) as error:
        load(checkpoint, target)
    assert "embed_tokens.weight" in str(error.value) and "k_proj.weight" in str(error.value)
