"""Where the pieces of a shard go until it is an array.

On a CPU backend a shard is one fresh, aligned host buffer: pieces are read straight into it, jax adopts it without a copy,
and it is never used again here. Elsewhere a piece is read into a buffer, transferred, and only then released; a shard
larger than a piece is filled on its device by donated in-place updates.
"""

import math
import mmap
import threading
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.boxes import Box, box_of, box_shape, contains, relative
from qwen_dist.checkpoint.plan import Parameter, Piece, Shard
from qwen_dist.checkpoint.quantized import dequantize

# XLA adopts a host buffer without copying only if it starts on this boundary.
BUFFER_ALIGNMENT = 64
_LARGE_BYTES = 2**20


class Blocks(NamedTuple):
    """Scales of a quantised box: [row blocks, column blocks], and the block of each row [R] and column [C]."""

    scale: np.ndarray
    row_blocks: np.ndarray
    column_blocks: np.ndarray


class Sink(Protocol):
    """Takes the pieces of one shard."""

    shard: Shard

    def place(self, piece: Piece) -> np.ndarray | None:
        """Memory to read the piece into, if all of it belongs to this shard, in this order; else None."""
        ...

    def write(self, box: Box, values: np.ndarray, blocks: Blocks | None, *, in_place: bool) -> None:
        """Takes the values of a box, and the scales of quantised ones.

        `in_place`: the values lie in memory that `place` gave; otherwise in memory that will be used again.
        """
        ...


class HostSink:
    """A shard on a CPU backend: one host buffer that the arrays of its devices adopt."""

    def __init__(self, parameter: Parameter, shard: Shard, array: "HostArray"):
        self.parameter, self.shard, self._array = parameter, shard, array

    @property
    def values(self) -> np.ndarray:
        return self._array.values(self.shard.box)

    def place(self, piece: Piece) -> np.ndarray | None:
        if self.parameter.dtype != self.parameter.disk_dtype or not contains(self.shard.box, piece.box):
            return None
        place = self.values[relative(piece.box, self.shard.box)]
        return place.reshape(-1).view(np.uint8) if place.flags.c_contiguous else None

    def write(self, box: Box, values: np.ndarray, blocks: Blocks | None, *, in_place: bool) -> None:
        if blocks is not None:
            values = dequantize(values, *blocks, self.parameter.dtype)
        if not in_place:
            np.copyto(self.values[relative(box, self.shard.box)], values, casting="unsafe")


@partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)


_dequantize = jax.jit(dequantize, static_argnames="dtype")


class DeviceSink:
    """A shard on accelerators: pieces are transferred and, if there is more than one, written into it in place."""

    def __init__(self, parameter: Parameter, shard: Shard):
        self.parameter, self.shard, self._lock = parameter, shard, threading.Lock()
        self._arrays: list[jax.Array] | None = None

    def place(self, piece: Piece) -> np.ndarray | None:
        return aligned_empty(piece.nbytes) if contains(self.shard.box, piece.box) else None

    def write(self, box: Box, values: np.ndarray, blocks: Blocks | None, *, in_place: bool) -> None:
        dtype = self.parameter.dtype
        # Narrow before the transfer, widen after it; what is transferred is never memory that is used again.
        narrow = dtype if dtype.itemsize < values.dtype.itemsize else values.dtype
        if not in_place or narrow != values.dtype:
            copy = aligned_empty(values.size * narrow.itemsize).view(narrow).reshape(values.shape)
            np.copyto(copy, values, casting="unsafe")
            values = copy
        parts = [jax.device_put(values, device) for device in self.shard.devices]
        if blocks is not None:
            parts = [_dequantize(part, *jax.device_put(blocks, part.device), dtype=dtype) for part in parts]
        with self._lock:
            if box == self.shard.box:
                self._arrays = [part.astype(dtype) for part in parts]
            else:
                start = tuple(start - origin for (start, _), (origin, _) in zip(box, self.shard.box, strict=True))
                wholes = self._arrays or self._zeros()
                self._arrays = [_update(whole, part, start) for whole, part in zip(wholes, parts, strict=True)]
            # The piece's memory counts against the budget until it has arrived.
            jax.block_until_ready(self._arrays)

    def _zeros(self) -> list[jax.Array]:
        shape = box_shape(self.shard.box)
        return [jnp.zeros(shape, self.parameter.dtype, device=device) for device in self.shard.devices]

    def arrays(self) -> list[jax.Array]:
        return self._arrays or self._zeros()


class HostArray:
    """Host memory for all shards of a parameter: one allocation, so that the system can use huge pages, made late."""

    def __init__(self, parameter: Parameter):
        self._parameter, self._lock = parameter, threading.Lock()
        self._memory: np.ndarray | None = None
        self._starts: dict[Box, int] = {}
        self._size = 0
        for shard in parameter.shards:
            self._starts[shard.box] = self._size
            nbytes = math.prod(box_shape(shard.box)) * parameter.dtype.itemsize
            self._size += nbytes + -nbytes % BUFFER_ALIGNMENT
        self.sinks = [HostSink(parameter, shard, self) for shard in parameter.shards]

    def values(self, box: Box) -> np.ndarray:
        with self._lock:
            if self._memory is None:
                self._memory = aligned_empty(self._size)
        shape, dtype, start = box_shape(box), self._parameter.dtype, self._starts[box]
        return self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def array(self) -> jax.Array:
        shape = self._parameter.shape

        def values(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return self.values(box_of(index, shape))

        # One call for all shards takes a fifth of the time of a `device_put` for each.
        return jax.make_array_from_callback(shape, self._parameter.sharding, values)


class DeviceArray:
    """The shards of a parameter on accelerators."""

    def __init__(self, parameter: Parameter):
        self._parameter = parameter
        self.sinks = [DeviceSink(parameter, shard) for shard in parameter.shards]

    def array(self) -> jax.Array:
        arrays = [array for sink in self.sinks for array in sink.arrays()]
        return jax.make_array_from_single_device_arrays(self._parameter.shape, self._parameter.sharding, arrays)


def make_array(parameter: Parameter) -> HostArray | DeviceArray:
    """What the pieces of a parameter are written to, until all have arrived."""
    return HostArray(parameter) if is_on_host(parameter) else DeviceArray(parameter)


def is_on_host(parameter: Parameter) -> bool:
    """Whether the parameter's arrays live in host memory, so that their buffers can be filled directly."""
    return all(device.platform == "cpu" for shard in parameter.shards for device in shard.devices)


def aligned_empty(nbytes: int) -> np.ndarray:
    """Fresh uninitialised bytes that jax's CPU backend adopts without a copy.

    Large ones come from the system rather than from malloc, which would keep them when they are freed.
    """
    if nbytes >= _LARGE_BYTES:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)
    memory = np.empty(nbytes + BUFFER_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % BUFFER_ALIGNMENT
    return memory[start : start + nbytes]
