"""The plan: boxes are split and merged without losing elements, and every byte is read once; equal plans, equal digests."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from qwen_dist.checkpoint import boxes
from qwen_dist.checkpoint.load import make_load_plan
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def arrays_with_boxes(draw):
    shape = tuple(draw(SIZES))
    box = tuple(sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape)
    return shape, tuple((a, max(b, a + 1)) for a, b in box)


def elements(box):
    return set(itertools.product(*(range(start, stop) for start, stop in box)))


@given(arrays_with_boxes(), st.integers(1, 50), st.integers(0, 3))
def test_split_covers_the_box_in_order(case, limit, first_dim):
    _, box = case
    first_dim = min(first_dim, len(box) - 1)
    chunks = list(boxes.split_box(box, limit, first_dim))
    assert [e for chunk in chunks for e in sorted(elements(chunk))] == sorted(elements(box))
    assert all(math.prod(boxes.box_shape(chunk)) <= limit for chunk in chunks)
    assert all(stop - start == 1 for chunk in chunks for start, stop in chunk[:first_dim])


@given(arrays_with_boxes())
def test_runs_are_contiguous(case):
    shape, box = case
    indices = np.arange(math.prod(shape)).reshape(shape)[boxes.relative_slices(box, ((0, 0),) * len(shape))].reshape(-1)
    run = boxes.run_length(box, shape)
    assert boxes.first_flat_index(box, shape) == indices[0] and len(indices) % run == 0
    starts = indices.reshape(-1, run)
    assert (starts - starts[:, :1] == np.arange(run)).all()
    assert run == len(indices) or starts[1, 0] != starts[0, -1] + 1
    assert (boxes.flat_indices(box, shape, 0, len(shape)) == indices).all()


@settings(max_examples=50)
@given(st.data())
def test_merged_shards_cover_the_same_elements(data):
    shape = tuple(data.draw(st.sampled_from([1, 2, 4, 8])) for _ in range(data.draw(st.integers(1, 3))))
    cuts = [data.draw(st.sampled_from([c for c in (1, 2, 4) if n % c == 0])) for n in shape]
    grid = [[(i * n // c, (i + 1) * n // c) for i in range(c)] for n, c in zip(shape, cuts, strict=True)]
    cells = [tuple(cell) for cell in itertools.product(*grid)]
    chosen = data.draw(st.lists(st.sampled_from(cells), min_size=1))
    merged = boxes.merge_boxes(chosen)
    covered = [e for box in merged for e in elements(box)]
    assert sorted(covered) == sorted(set().union(*map(elements, chosen)))
    if set(chosen) == set(cells):
        assert merged == [tuple((0, n) for n in shape)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import safetensors.numpy

    folder = tmp_path_factory.mktemp("plan")
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.zeros((512, 768), "float16") for i in range(4)}
    tensors |= {f"model.layers.{i}.norm.weight": np.zeros(768, "float16") for i in range(4)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder)


def target_for(checkpoint, mesh, matrix_spec):
    return {
        name.removeprefix("model."): jax.ShapeDtypeStruct(
            info.shape,
            info.dtype.numpy,
            sharding=NamedSharding(mesh, matrix_spec if len(info.shape) == 2 else PartitionSpec()),
        )
        for name, info in checkpoint.tensors.items()
    }


def all_specs():
    axes = [None, "a", "b", ("a", "b")]
    for rows, columns in itertools.product(axes, axes):
        used = [axis for entry in (rows, columns) if entry for axis in ([entry] if isinstance(entry, str) else entry)]
        if len(used) == len(set(used)):
            yield PartitionSpec(rows, columns)


@pytest.mark.parametrize("spec", list(all_specs()), ids=str)
@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4), (1, 1)])
def test_every_byte_is_read_once_per_process(checkpoint, mesh_shape, spec):
    mesh = jax.make_mesh(mesh_shape, ("a", "b"), devices=jax.devices()[: math.prod(mesh_shape)])
    plan = make_load_plan(checkpoint, target_for(checkpoint, mesh, spec))
    unique = sum(info.nbytes for info in checkpoint.tensors.values())
    assert plan.bytes_needed == unique
    assert plan.bytes_read <= unique * (1.02 if spec[1] is None else 1.05)
    per_device = plan.bytes_per_device()
    assert len(per_device) == math.prod(mesh_shape)
    shards = NamedSharding(mesh, spec).shard_shape((512, 768))
    assert set(per_device.values()) == {4 * 2 * (math.prod(shards) + 768)}


def test_budget_bounds_host_memory(checkpoint):
    mesh = jax.make_mesh((8,), ("a",))
    target = target_for(checkpoint, mesh, PartitionSpec(None, "a"))
    for budget in (128 * 1024, 1_000_000, 10_000_000, 10**9):
        plan = make_load_plan(checkpoint, target, host_memory_budget=budget)
        assert plan.host_memory_bytes <= budget
        assert all(chunk.nbytes <= plan.chunk_bytes for request in plan.requests for chunk in request.chunks)
        assert all(request.end - request.begin <= plan.chunk_bytes for request in plan.requests if len(request.chunks) > 1)


@pytest.mark.fault
def test_budget_too_small(checkpoint):
    mesh = jax.make_mesh((1,), ("a",), devices=jax.devices()[:1])
    with pytest.raises(CheckpointError, match="budget of 1000 bytes is too small; give at least 131072"):
        make_load_plan(checkpoint, target_for(checkpoint, mesh, PartitionSpec()), host_memory_budget=1000)


def test_digest_depends_only_on_what_must_be_equal(checkpoint):
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    target = target_for(checkpoint, mesh, PartitionSpec("a"))
    digest = make_load_plan(checkpoint, target).digest
    assert make_load_plan(checkpoint, dict(reversed(target.items())), host_memory_budget=10**6).digest == digest
    assert make_load_plan(checkpoint, target_for(checkpoint, mesh, PartitionSpec("b"))).digest != digest
    other = jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices()[::-1])
    assert make_load_plan(checkpoint, target_for(checkpoint, other, PartitionSpec("a"))).digest != digest


def test_plan_prints_as_a_summary(checkpoint):
    mesh = jax.make_mesh((8,), ("a",))
    text = str(make_load_plan(checkpoint, target_for(checkpoint, mesh, PartitionSpec("a"))))
    assert "8 parameters from 1 files" in text and "(1.000 x the minimum)" in text
