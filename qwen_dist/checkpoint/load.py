"""Load a checkpoint: make a plan, then let a few threads read chunks and write them to the shards they belong to.

The memory for buffers is bounded: the number of threads times one chunk and one copy of it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax
import numpy as np

from qwen_dist.checkpoint.boxes import Box, intersect, relative_slices
from qwen_dist.checkpoint.buffers import EncodingBuffer, ShardBuffer, aligned_empty, is_on_host, make_array_builder
from qwen_dist.checkpoint.fp8 import BlockScales, read_block_size
from qwen_dist.checkpoint.names import NameMap, map_names
from qwen_dist.checkpoint.packed import PackedWeight
from qwen_dist.checkpoint.plan import (
    COPIES_PER_CHUNK,
    Chunk,
    LoadPlan,
    Parameter,
    ReadRequest,
    make_digest,
    make_parameters,
    make_read_requests,
    make_result,
)
from qwen_dist.checkpoint.source import Checkpoint
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import CheckpointError, problem_list
from qwen_dist.storage.files import ReadOptions

T = TypeVar("T")

# On the host a chunk should stay in the CPU cache while it is divided. For a device it should rather hold a whole shard:
# each shape of an in-place update is one more program to compile.
MAX_HOST_CHUNK_BYTES = 4 * 2**20
MAX_DEVICE_CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_BYTES = 64 * 1024

ProgressCallback = Callable[[int, int], None]


def load(
    checkpoint: Checkpoint,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
    names: NameMap | None = None,
    packed: Sequence[PackedWeight] = (),
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, jax.Array]:
    """Load a checkpoint into arrays with the shapes, dtypes and shardings of `target`.

    With several processes, all of them must call this with the same arguments; each reads what its own devices hold. Groups
    of processes with separate meshes may load independently.

    Args:
      checkpoint: an opened checkpoint.
      target: the abstract model: parameter name (as in the checkpoint, without prefix) -> shape, dtype and sharding.
      disk_shapes: shapes on disk of the parameters whose target shape is a reshape of it, such as [N*H, D] for
        `q_proj.weight` [N, H, D]. Other parameters have their target shape on disk.
      tied: the model's output head is its embedding.
      names: where each parameter is on disk; by default found by `names.map_names`, which wants the whole model.
      packed: the weights of the target that are kept quantised, and what their arrays are made of.
      host_memory_budget: bytes of host memory for buffers, not counting arrays that are in host memory themselves; by
        default a sixteenth of the machine's memory.
      progress: called with (bytes done, total bytes), from any thread, one call at a time.

    Returns:
      The arrays by parameter name.

    Raises:
      CheckpointError: checkpoint and model do not fit, a file cannot be read, or another process failed.
    """
    processes = {device.process_index for leaf in target.values() for device in leaf.sharding.device_set}
    with sync_processes("planning the load", processes) as sync_point:
        plan = make_load_plan(
            checkpoint,
            target,
            disk_shapes=disk_shapes,
            tied=tied,
            names=names,
            packed=packed,
            host_memory_budget=host_memory_budget,
        )
        sync_point.digest = plan.digest
    with sync_processes("loading", processes):
        return execute_plan(plan, checkpoint, progress)


def make_load_plan(
    checkpoint: Checkpoint,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
    names: NameMap | None = None,
    packed: Sequence[PackedWeight] = (),
    host_memory_budget: int | None = None,
) -> LoadPlan:
    """Return the plan that `load` executes on this process, without reading any data. Arguments and errors as in `load`."""
    tensors, block = checkpoint.tensors, read_block_size(checkpoint.config)
    packed_arrays = {name for weight in packed for name in weight.arrays.values()}
    read = {name: struct for name, struct in target.items() if name not in packed_arrays}
    shapes = {name: tuple(struct.shape) for name, struct in read.items()}
    shapes |= {name: shape for name, shape in (disk_shapes or {}).items() if name not in packed_arrays}
    sources = {source.name: source for weight in packed for source, _ in weight.sources}
    shapes |= {name: source.disk_shape for name, source in sources.items()}
    read |= {source.name: struct for weight in packed for source, struct in weight.sources}
    unread = {name for weight in packed for name in weight.unread}
    names = names or map_names(shapes, tensors, tied=tied, unread=unread)
    parameters = make_parameters(read, names, tensors, block, sources)
    results = {
        weight.name: {suffix: make_result(name, target[name]) for suffix, name in weight.arrays.items()}
        for weight in packed
    }
    num_threads, chunk_bytes = fit_to_budget(checkpoint.read_options, parameters, host_memory_budget)
    requests = make_read_requests(
        parameters, names, tensors, chunk_bytes=chunk_bytes, max_gap=checkpoint.read_options.max_gap
    )
    tied_head_bytes = sum(tensors[name].nbytes for name in names.tied_head or ()) if jax.process_index() == 0 else 0
    digest = make_digest((*parameters, *(one for of_weight in results.values() for one in of_weight.values())), tensors)
    return LoadPlan(parameters, results, requests, names, chunk_bytes, num_threads, tied_head_bytes, digest)


def fit_to_budget(read_options: ReadOptions, parameters: Iterable[Parameter], budget: int | None) -> tuple[int, int]:
    """Return the number of threads and the bytes of a chunk such that the buffers of all threads fit into the budget."""
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    num_threads = min(read_options.num_threads, budget // (COPIES_PER_CHUNK * MIN_CHUNK_BYTES))
    if num_threads == 0:
        minimum = COPIES_PER_CHUNK * MIN_CHUNK_BYTES
        raise CheckpointError(f"A host memory budget of {budget} bytes is too small; give at least {minimum} bytes.")
    on_host = all(map(is_on_host, parameters))
    limit = read_options.chunk_bytes or (MAX_HOST_CHUNK_BYTES if on_host else MAX_DEVICE_CHUNK_BYTES)
    return num_threads, min(limit, budget // (COPIES_PER_CHUNK * num_threads))


def execute_plan(plan: LoadPlan, checkpoint: Checkpoint, progress: ProgressCallback | None = None) -> dict[str, jax.Array]:
    """Read everything in the plan and return the arrays by parameter name."""
    if plan.tied_head_bytes:
        _check_tied_head(plan, checkpoint)
    builders = {parameter.name: make_array_builder(parameter) for parameter in plan.arrays}
    buffers: dict[str, Sequence[ShardBuffer]] = {name: builder.buffers for name, builder in builders.items()}
    problems: set[str] = set()
    buffers |= _encoding_buffers(plan, buffers, problems)
    counter, scratch = ByteCounter(plan.bytes_read, progress, plan.tied_head_bytes), threading.local()
    # One unit of a source may be larger than a chunk.
    scratch_bytes = max([plan.chunk_bytes, *(request.nbytes for request in plan.requests)])

    def run(request: ReadRequest) -> None:
        if not hasattr(scratch, "buffer"):
            scratch.buffer = aligned_empty(scratch_bytes)
        _execute_request(request, checkpoint, buffers, scratch.buffer)
        counter.add(request.nbytes)

    run_in_threads(run, plan.requests, plan.num_threads)
    if problems:
        raise CheckpointError("Weights that contradict config.json:\n" + problem_list(sorted(problems)))
    return {name: builder.build() for name, builder in builders.items()}


def _encoding_buffers(
    plan: LoadPlan, buffers: Mapping[str, Sequence[ShardBuffer]], problems: set[str]
) -> dict[str, Sequence[ShardBuffer]]:
    """Return the buffers of each source, which write to those of the arrays of its weight."""
    of_weight = {
        weight: {suffix: buffers[array.name] for suffix, array in arrays.items()} for weight, arrays in plan.packed.items()
    }
    return {
        parameter.name: [
            EncodingBuffer(parameter, shard, of_weight[parameter.source.weight], problems) for shard in parameter.shards
        ]
        for parameter in plan.parameters
        if parameter.source is not None
    }


class ByteCounter:
    """Counts bytes from many threads and calls the progress callback, one call at a time."""

    def __init__(self, total: int, progress: ProgressCallback | None, done: int = 0):
        self._total, self._progress, self._done, self._lock = total, progress, done, threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def run_in_threads(function: Callable[[T], None], items: Sequence[T], num_threads: int) -> None:
    """Call the function for every item on a few threads; the first exception (or Ctrl-C) stops all and is raised."""
    stop, queue, lock = threading.Event(), iter(items), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                function(item)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(num_threads)]):
                future.result()
        finally:
            stop.set()


def _check_tied_head(plan: LoadPlan, checkpoint: Checkpoint) -> None:
    """Compare a stored output head, byte by byte, with the embedding that config.json ties it to."""
    assert plan.names.tied_head is not None
    head, embedding = (checkpoint.tensors[name] for name in plan.names.tied_head)
    size = head.nbytes
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape):
        one, other = (np.empty(plan.chunk_bytes, np.uint8) for _ in range(2))
        for start in range(0, size, plan.chunk_bytes):
            length = min(plan.chunk_bytes, size - start)
            checkpoint.files[head.file].read_into(head.begin + start, one.data[:length])
            checkpoint.files[embedding.file].read_into(embedding.begin + start, other.data[:length])
            if not np.array_equal(one[:length], other[:length]):
                break
        else:
            return
    raise CheckpointError(
        f"config.json ties the output head to the embedding, but {head.name} ({head.dtype.name} {list(head.shape)}) and "
        f"{embedding.name} ({embedding.dtype.name} {list(embedding.shape)}) differ; set tie_word_embeddings to false, or "
        f"remove {head.name}, whichever is correct for this model."
    )


def _execute_request(
    request: ReadRequest, checkpoint: Checkpoint, buffers: Mapping[str, Sequence[ShardBuffer]], scratch: np.ndarray
) -> None:
    """Read one byte range and write each of its chunks to the shards it overlaps."""
    file = checkpoint.files[request.file]
    if len(request.chunks) > 1:
        file.read_into(request.begin, scratch.data[: request.nbytes])
        for chunk in request.chunks:
            start = next(chunk.offsets()) - request.begin
            _write_to_shards(chunk, scratch[start : start + chunk.nbytes], None, buffers, in_place=False)
        return
    (chunk,) = request.chunks
    scale = None if chunk.scale is None else _read_scale(chunk, checkpoint)
    view = next((view for buffer in buffers[chunk.parameter.name] if (view := buffer.view_for(chunk)) is not None), None)
    data = scratch[: chunk.nbytes] if view is None else view
    for position, offset in zip(range(0, chunk.nbytes, chunk.run_bytes), chunk.offsets(), strict=True):
        file.read_into(offset, data.data[position : position + chunk.run_bytes])
    _write_to_shards(chunk, data, scale, buffers, in_place=view is not None)


def _read_scale(chunk: Chunk, checkpoint: Checkpoint) -> np.ndarray:
    """Read the rows of the scale that a quantised chunk needs."""
    assert chunk.scale is not None
    scale, (start, _) = chunk.scale, chunk.scale_rows()
    row_bytes = scale.nbytes // math.prod(scale.shape[:-1])
    data = np.empty(chunk.scale_bytes, np.uint8)
    checkpoint.files[scale.file].read_into(scale.begin + start * row_bytes, data.data)
    return data.view(np.dtype(scale.dtype.numpy)).reshape(-1, scale.shape[-1])


def _write_to_shards(
    chunk: Chunk,
    data: np.ndarray,
    scale: np.ndarray | None,
    buffers: Mapping[str, Sequence[ShardBuffer]],
    *,
    in_place: bool,
) -> None:
    values = data.view(chunk.parameter.disk_dtype).reshape(chunk.shape)
    for buffer in buffers[chunk.parameter.name]:
        common = intersect(chunk.box, buffer.shard.box)
        if common is not None:
            blocks = None if scale is None else _block_scales(chunk, common, scale)
            buffer.write(common, values[relative_slices(common, chunk.box)], blocks, in_place=in_place)


def _block_scales(chunk: Chunk, box: Box, scale: np.ndarray) -> BlockScales:
    """Return the scale of a box of a quantised chunk, and the block index of each of its rows and columns."""
    assert chunk.parameter.block is not None
    rows, columns = chunk.parameter.matrix_indices(box)
    first_row = chunk.parameter.matrix_indices(chunk.box)[0][0] // chunk.parameter.block[0]
    return BlockScales(scale, rows // chunk.parameter.block[0] - first_row, columns // chunk.parameter.block[1])
