"""Loads a checkpoint: plans, then has a few threads read pieces and hand them to the shards they belong to.

What is held at a time is bounded by arithmetic: so many threads, each with one piece and one copy of it.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax
import numpy as np

from qwen_dist.checkpoint.agree import together
from qwen_dist.checkpoint.boxes import Box, intersect, relative
from qwen_dist.checkpoint.mapping import map_names
from qwen_dist.checkpoint.plan import (
    COPIES_PER_PIECE,
    Parameter,
    Piece,
    Plan,
    Read,
    make_digest,
    make_parameters,
    make_reads,
)
from qwen_dist.checkpoint.quantized import read_block_size
from qwen_dist.checkpoint.sinks import Blocks, Sink, aligned_empty, is_on_host, make_array
from qwen_dist.checkpoint.source import Access, Checkpoint
from qwen_dist.errors import CheckpointError

T = TypeVar("T")

# On the host a piece should stay in cache while it is divided. Towards a device it should rather hold all of a shard: every
# shape of an in-place update is a program to compile.
MAX_HOST_PIECE_BYTES = 4 * 2**20
MAX_DEVICE_PIECE_BYTES = 256 * 2**20
MIN_PIECE_BYTES = 64 * 1024

Progress = Callable[[int, int], None]


def load(
    checkpoint: Checkpoint,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
    host_memory_budget: int | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Loads a checkpoint into arrays of the shapes, dtypes and shardings of `target`.

    With several processes all of them call this with the same arguments; each reads what its own devices hold. Groups of
    processes may each load for a mesh of their own.

    Args:
        checkpoint: an opened checkpoint.
        target: the abstract model: parameter name (the checkpoint's, without prefix) -> shape, dtype and sharding.
        disk_shapes: the shape on disk of the parameters whose target shape is a view of it, such as [N*H, D] for
            `q_proj.weight` [N, H, D]; parameters not named have their target shape on disk.
        tied: the model's output head is its embedding.
        host_memory_budget: bytes of host memory for buffers, beyond the arrays themselves where these live on the host;
            by default a sixteenth of the machine's memory.
        progress: called with (bytes done, bytes in all), from any thread, one call at a time.

    Raises:
        CheckpointError: checkpoint and model do not fit, a file cannot be read, or another process failed; no array is
            returned then.
    """
    processes = {device.process_index for leaf in target.values() for device in leaf.sharding.device_set}
    with together("planning the load", processes) as step:
        plan = make_plan(checkpoint, target, disk_shapes=disk_shapes, tied=tied, host_memory_budget=host_memory_budget)
        step.digest = plan.digest
    with together("loading", processes):
        return execute(plan, checkpoint, progress)


def make_plan(
    checkpoint: Checkpoint,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
    host_memory_budget: int | None = None,
) -> Plan:
    """The plan that `load` executes on this process; nothing is read. Arguments and errors as there."""
    tensors = checkpoint.tensors
    shapes = {name: tuple(struct.shape) for name, struct in target.items()} | dict(disk_shapes or {})
    block = read_block_size(checkpoint.config)
    names = map_names(shapes, tensors, tied=tied)
    parameters = make_parameters(target, names, tensors, block)
    num_threads, piece_bytes = budget_sizes(checkpoint.access, parameters, host_memory_budget)
    reads = make_reads(parameters, names, tensors, piece_bytes=piece_bytes, max_gap=checkpoint.access.max_gap)
    checked = sum(tensors[name].nbytes for name in names.tied_head or ()) if jax.process_index() == 0 else 0
    digest = make_digest(parameters, tensors)
    return Plan(parameters, reads, names, piece_bytes, num_threads, checked, digest)


def budget_sizes(access: Access, parameters: Iterable[Parameter], budget: int | None) -> tuple[int, int]:
    """Threads, and bytes of a piece, such that all threads together stay within the budget."""
    if budget is None:
        budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    num_threads = min(access.num_threads, budget // (COPIES_PER_PIECE * MIN_PIECE_BYTES))
    if num_threads == 0:
        least = COPIES_PER_PIECE * MIN_PIECE_BYTES
        raise CheckpointError(f"A host memory budget of {budget} bytes is too small; give at least {least} bytes.")
    on_host = all(map(is_on_host, parameters))
    limit = access.piece_bytes or (MAX_HOST_PIECE_BYTES if on_host else MAX_DEVICE_PIECE_BYTES)
    return num_threads, min(limit, budget // (COPIES_PER_PIECE * num_threads))


def execute(plan: Plan, checkpoint: Checkpoint, progress: Progress | None = None) -> dict[str, jax.Array]:
    """Reads everything the plan says and returns the arrays by parameter name."""
    if plan.check_bytes:
        _check_tied_head(plan, checkpoint)
    arrays = {parameter.name: make_array(parameter) for parameter in plan.parameters}
    sinks = {name: array.sinks for name, array in arrays.items()}
    counter, scratch = Counter(plan.bytes_read, progress, plan.check_bytes), threading.local()

    def run(read: Read) -> None:
        if not hasattr(scratch, "buffer"):
            scratch.buffer = aligned_empty(plan.piece_bytes)
        _perform(read, checkpoint, sinks, scratch.buffer)
        counter.add(read.nbytes)

    run_all(run, plan.reads, plan.num_threads)
    return {name: array.array() for name, array in arrays.items()}


class Counter:
    """Counts bytes from many threads and tells the progress function, one call at a time."""

    def __init__(self, total: int, progress: Progress | None, done: int = 0):
        self._total, self._progress, self._done, self._lock = total, progress, done, threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def run_all(function: Callable[[T], None], items: Sequence[T], num_threads: int) -> None:
    """Calls the function for every item on a few threads; the first exception (or Ctrl-C) stops them all and is raised."""
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


def _check_tied_head(plan: Plan, checkpoint: Checkpoint) -> None:
    """Compares a stored head, byte by byte, with the embedding it is said to be tied to."""
    assert plan.names.tied_head is not None
    head, embedding = (checkpoint.tensors[name] for name in plan.names.tied_head)
    size = head.nbytes
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape):
        one, other = (np.empty(plan.piece_bytes, np.uint8) for _ in range(2))
        for start in range(0, size, plan.piece_bytes):
            length = min(plan.piece_bytes, size - start)
            checkpoint.files[head.file].read_into(head.begin + start, one.data[:length])
            checkpoint.files[embedding.file].read_into(embedding.begin + start, other.data[:length])
            if not np.array_equal(one[:length], other[:length]):
                break
        else:
            return
    raise CheckpointError(
        f"config.json ties the output head to the embedding, but {head.name} ({head.dtype.name} {list(head.shape)}) and "
        f"{embedding.name} ({embedding.dtype.name} {list(embedding.shape)}) differ; set tie_word_embeddings to false, or "
        f"remove {head.name}, whichever is right for this model."
    )


def _perform(read: Read, checkpoint: Checkpoint, sinks: Mapping[str, Sequence[Sink]], scratch: np.ndarray) -> None:
    """Reads one byte range and hands each of its pieces to the shards that it meets."""
    file = checkpoint.files[read.file]
    if len(read.pieces) > 1:
        file.read_into(read.begin, scratch.data[: read.nbytes])
        for piece in read.pieces:
            start = next(piece.offsets()) - read.begin
            _deliver(piece, scratch[start : start + piece.nbytes], None, sinks, in_place=False)
        return
    (piece,) = read.pieces
    scale = None if piece.scale is None else _read_scale(piece, checkpoint)
    place = next((place for sink in sinks[piece.parameter.name] if (place := sink.place(piece)) is not None), None)
    data = scratch[: piece.nbytes] if place is None else place
    for position, offset in zip(range(0, piece.nbytes, piece.run_bytes), piece.offsets(), strict=True):
        file.read_into(offset, data.data[position : position + piece.run_bytes])
    _deliver(piece, data, scale, sinks, in_place=place is not None)


def _read_scale(piece: Piece, checkpoint: Checkpoint) -> np.ndarray:
    """The rows of the scale that a quantised piece needs."""
    assert piece.scale is not None
    scale, (start, _) = piece.scale, piece.scale_rows()
    row_bytes = scale.nbytes // math.prod(scale.shape[:-1])
    data = np.empty(piece.scale_bytes, np.uint8)
    checkpoint.files[scale.file].read_into(scale.begin + start * row_bytes, data.data)
    return data.view(np.dtype(scale.dtype.numpy)).reshape(-1, scale.shape[-1])


def _deliver(
    piece: Piece, data: np.ndarray, scale: np.ndarray | None, sinks: Mapping[str, Sequence[Sink]], *, in_place: bool
) -> None:
    values = data.view(piece.parameter.disk_dtype).reshape(piece.shape)
    for sink in sinks[piece.parameter.name]:
        common = intersect(piece.box, sink.shard.box)
        if common is not None:
            blocks = None if scale is None else _blocks(piece, common, scale)
            sink.write(common, values[relative(common, piece.box)], blocks, in_place=in_place)


def _blocks(piece: Piece, box: Box, scale: np.ndarray) -> Blocks:
    """The scale of a box of a quantised piece, and the block of each of its rows and columns."""
    assert piece.parameter.block is not None
    rows, columns = piece.parameter.matrix_indices(box)
    first_row = piece.parameter.matrix_indices(piece.box)[0][0] // piece.parameter.block[0]
    return Blocks(scale, rows // piece.parameter.block[0] - first_row, columns // piece.parameter.block[1])
