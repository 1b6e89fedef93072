"""Executes a plan: a few threads read pieces and put them where they belong, never holding more than the budget.

On a CPU backend a shard is one fresh, aligned host buffer; pieces are read straight into it and jax adopts it without a
copy (so it is never used again here). Elsewhere a piece is read into a buffer, transferred, and only then released; a
shard larger than a piece is filled on its device by donated in-place updates.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.mapping import map_names
from qwen_dist.checkpoint.plan import (
    Box,
    Parameter,
    Piece,
    Plan,
    Read,
    Shard,
    box_shape,
    intersect,
    make_parameters,
    make_reads,
    relative,
)
from qwen_dist.checkpoint.source import Checkpoint
from qwen_dist.errors import CheckpointError

# XLA adopts a host buffer without copying only if it starts on this boundary.
BUFFER_ALIGNMENT = 64
NUM_THREADS = 8
MAX_PIECE_BYTES = 16 * 2**20
MIN_PIECE_BYTES = 64 * 1024
# Bytes that are cheaper to read and drop than to skip, on a local disk.
LOCAL_GAP_BYTES = 16 * 1024

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

    Args:
        checkpoint: an opened checkpoint.
        target: the abstract model: parameter name (the checkpoint's, without prefix) -> shape, dtype and sharding.
        disk_shapes: the shape on disk of the parameters whose target shape is a view of it, such as [N*H, D] for
            `q_proj.weight` [N, H, D]; parameters not named have their target shape on disk.
        tied: the model's output head is its embedding.
        host_memory_budget: bytes of host memory for buffers, beyond the arrays themselves where these live on the host.
        progress: called with (bytes done, bytes in all), from any thread, one call at a time.

    Raises:
        CheckpointError: checkpoint and model do not fit, or a file cannot be read; no array is returned then.
    """
    plan = make_plan(checkpoint, target, disk_shapes=disk_shapes, tied=tied, host_memory_budget=host_memory_budget)
    return execute(plan, checkpoint, progress)


def make_plan(
    checkpoint: Checkpoint,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
    host_memory_budget: int | None = None,
) -> Plan:
    """The plan that `load` executes; arguments and errors as there."""
    shapes = {name: tuple(struct.shape) for name, struct in target.items()} | dict(disk_shapes or {})
    names = map_names(shapes, checkpoint.tensors, tied=tied)
    parameters = make_parameters(target, names, checkpoint.tensors)
    piece_bytes = _piece_bytes(host_memory_budget)
    reads = make_reads(parameters, checkpoint.tensors, piece_bytes=piece_bytes, max_gap=LOCAL_GAP_BYTES)
    return Plan(parameters, reads, names, piece_bytes)


def _piece_bytes(budget: int | None) -> int:
    if budget is None:
        return MAX_PIECE_BYTES
    # A thread holds the piece it reads and, while it divides or casts it, one copy.
    piece = min(MAX_PIECE_BYTES, budget // (2 * NUM_THREADS))
    if piece < MIN_PIECE_BYTES:
        least = 2 * NUM_THREADS * MIN_PIECE_BYTES
        raise CheckpointError(f"A host memory budget of {budget} bytes is too small; give at least {least} bytes.")
    return piece


def execute(plan: Plan, checkpoint: Checkpoint, progress: Progress | None = None) -> dict[str, jax.Array]:
    """Reads everything the plan says and returns the arrays by parameter name."""
    sinks = {parameter.name: [_make_sink(parameter, shard) for shard in parameter.shards] for parameter in plan.parameters}
    for read in plan.reads:
        for piece in read.pieces:
            for sink in sinks[piece.parameter.name]:
                sink.pending += intersect(piece.box, sink.shard.box) is not None
    done, lock, stop = 0, threading.Lock(), threading.Event()

    def run(read: Read) -> None:
        nonlocal done
        if stop.is_set():
            return
        _perform(read, checkpoint, sinks)
        with lock:
            done += read.nbytes
            if progress is not None:
                progress(done, plan.bytes_read)

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="load") as pool:
        futures = [pool.submit(run, read) for read in plan.reads]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {parameter.name: _assemble(parameter, sinks.pop(parameter.name)) for parameter in plan.parameters}


def _perform(read: Read, checkpoint: Checkpoint, sinks: Mapping[str, list["Sink"]]) -> None:
    file = checkpoint.files[read.file]
    if len(read.pieces) == 1:
        (piece,) = read.pieces
        direct = next((view for sink in sinks[piece.parameter.name] if (view := sink.direct(piece)) is not None), None)
        data = np.empty(piece.nbytes, np.uint8) if direct is None else direct
        for position, offset in zip(range(0, piece.nbytes, piece.run_bytes), piece.offsets(), strict=True):
            file.read_into(offset, memoryview(data)[position : position + piece.run_bytes])
        _deliver(piece, None if direct is not None else data, sinks)
        return
    data = np.empty(read.nbytes, np.uint8)
    file.read_into(read.begin, memoryview(data))
    for piece in read.pieces:
        start = next(piece.offsets()) - read.begin
        _deliver(piece, data[start : start + piece.nbytes], sinks)


def _deliver(piece: Piece, data: np.ndarray | None, sinks: Mapping[str, list["Sink"]]) -> None:
    """Hands a piece's bytes to every shard it meets; None: they were read in place."""
    for sink in sinks[piece.parameter.name]:
        common = intersect(piece.box, sink.shard.box)
        if common is not None:
            if data is not None:
                values = data.view(piece.parameter.disk_dtype).reshape(piece.shape)[relative(common, piece.box)]
                sink.write(common, values)
            sink.arrived()


class Sink(Protocol):
    """Takes the pieces of one shard and turns them into arrays on its devices."""

    shard: Shard
    pending: int

    def direct(self, piece: Piece) -> np.ndarray | None:
        """The bytes to read the piece into when they are its final place, else None."""
        ...

    def write(self, box: Box, values: np.ndarray) -> None: ...

    def arrived(self) -> None:
        """Counts a piece; with the last one the arrays are made."""
        ...

    def arrays(self) -> list[jax.Array]: ...


class HostSink:
    """A shard on a CPU backend: one buffer that the devices' arrays alias."""

    def __init__(self, parameter: Parameter, shard: Shard):
        self.parameter, self.shard, self.pending = parameter, shard, 0
        self._lock = threading.Lock()
        self._values: np.ndarray | None = None

    def _buffer(self) -> np.ndarray:
        with self._lock:
            if self._values is None:
                self._values = aligned_empty(box_shape(self.shard.box), self.parameter.dtype)
            return self._values

    def direct(self, piece: Piece) -> np.ndarray | None:
        if self.parameter.dtype != self.parameter.disk_dtype or intersect(piece.box, self.shard.box) != piece.box:
            return None
        place = self._buffer()[relative(piece.box, self.shard.box)]
        return place.reshape(-1).view(np.uint8) if place.flags.c_contiguous else None

    def write(self, box: Box, values: np.ndarray) -> None:
        np.copyto(self._buffer()[relative(box, self.shard.box)], values, casting="unsafe")

    def arrived(self) -> None:
        with self._lock:
            self.pending -= 1

    def arrays(self) -> list[jax.Array]:
        assert self.pending == 0
        values = self._buffer()
        return [jax.device_put(values, device) for device in self.shard.devices]


@partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)


class DeviceSink:
    """A shard on an accelerator: pieces are transferred and, if there is more than one, written into it in place."""

    def __init__(self, parameter: Parameter, shard: Shard):
        self.parameter, self.shard, self.pending = parameter, shard, 0
        self._lock = threading.Lock()
        self._arrays: list[jax.Array] | None = None

    def direct(self, piece: Piece) -> np.ndarray | None:
        return None

    def write(self, box: Box, values: np.ndarray) -> None:
        dtype = self.parameter.dtype
        # Narrow before the transfer, widen after it.
        values = np.ascontiguousarray(values, dtype if dtype.itemsize < values.dtype.itemsize else None)
        parts = [jax.device_put(values, device) for device in self.shard.devices]
        with self._lock:
            if box == self.shard.box:
                self._arrays = [part.astype(dtype) for part in parts]
            else:
                start = tuple(part.start for part in relative(box, self.shard.box))
                wholes = self._arrays or [self._empty(device) for device in self.shard.devices]
                self._arrays = [_update(whole, part, start) for whole, part in zip(wholes, parts, strict=True)]
            jax.block_until_ready(self._arrays)

    def _empty(self, device: jax.Device) -> jax.Array:
        return jnp.zeros(box_shape(self.shard.box), self.parameter.dtype, device=device)

    def arrived(self) -> None:
        with self._lock:
            self.pending -= 1

    def arrays(self) -> list[jax.Array]:
        assert self.pending == 0
        return self._arrays or [self._empty(device) for device in self.shard.devices]


def _make_sink(parameter: Parameter, shard: Shard) -> Sink:
    on_host = all(device.platform == "cpu" for device in shard.devices)
    return HostSink(parameter, shard) if on_host else DeviceSink(parameter, shard)


def _assemble(parameter: Parameter, sinks: list[Sink]) -> jax.Array:
    arrays = [array for sink in sinks for array in sink.arrays()]
    return jax.make_array_from_single_device_arrays(parameter.shape, parameter.sharding, arrays)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A fresh uninitialised array whose memory jax's CPU backend adopts as it is."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + BUFFER_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % BUFFER_ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
