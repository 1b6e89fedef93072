"""Buffers that collect the chunks of a shard until it becomes an array.

On a CPU backend a shard is a new, aligned host buffer. Chunks are read directly into it, and jax adopts it without a copy;
it is never used again here. On other backends a chunk is read into a host buffer, transferred, and only then released; a
shard larger than a chunk is filled on its device by donated in-place updates.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.boxes import Box, box_from_slices, box_shape, contains, intersect, relative_slices
from qwen_dist.checkpoint.fp8 import BlockScales, dequantize
from qwen_dist.checkpoint.plan import Chunk, Parameter, Shard
from qwen_dist.errors import CheckpointError

# XLA adopts a host buffer without a copy only if its address is a multiple of this.
BUFFER_ALIGNMENT = 64
_LARGE_BYTES = 2**20


class ShardBuffer(Protocol):
    """Receives the chunks of one shard."""

    shard: Shard

    def view_for(self, chunk: Chunk) -> np.ndarray | None:
        """Return memory to read the chunk into, or None unless the whole chunk lies contiguously in this shard."""
        ...

    def write(self, box: Box, values: np.ndarray, blocks: BlockScales | None, *, in_place: bool) -> None:
        """Write the values of a box.

        Args:
          box: the part of the parameter that the values are.
          values: the values, in the dtype on disk.
          blocks: the scales of quantised values, else None.
          in_place: the values are in memory that `view_for` returned; otherwise the memory will be reused.
        """
        ...


class HostBuffer:
    """A shard on a CPU backend: one host buffer, which the arrays of its devices adopt."""

    def __init__(self, parameter: Parameter, shard: Shard, builder: HostArrayBuilder):
        self.parameter, self.shard, self._builder = parameter, shard, builder

    @property
    def values(self) -> np.ndarray:
        return self._builder.values(self.shard.box)

    def view_for(self, chunk: Chunk) -> np.ndarray | None:
        if self.parameter.dtype != self.parameter.disk_dtype or not contains(self.shard.box, chunk.box):
            return None
        view = self.values[relative_slices(chunk.box, self.shard.box)]
        return view.reshape(-1).view(np.uint8) if view.flags.c_contiguous else None

    def write(self, box: Box, values: np.ndarray, blocks: BlockScales | None, *, in_place: bool) -> None:
        if blocks is not None:
            values = dequantize(values, *blocks, self.parameter.dtype)
        if not in_place:
            np.copyto(self.values[relative_slices(box, self.shard.box)], values, casting="unsafe")


@partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, update: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, update.astype(array.dtype), start)


_dequantize = jax.jit(dequantize, static_argnames="dtype")


class DeviceBuffer:
    """A shard on accelerators: chunks are transferred and, if there are several, written into it in place."""

    def __init__(self, parameter: Parameter, shard: Shard):
        self.parameter, self.shard, self._lock = parameter, shard, threading.Lock()
        self._arrays: list[jax.Array] | None = None

    def view_for(self, chunk: Chunk) -> np.ndarray | None:
        return aligned_empty(chunk.nbytes) if contains(self.shard.box, chunk.box) else None

    def write(self, box: Box, values: np.ndarray, blocks: BlockScales | None, *, in_place: bool) -> None:
        dtype = self.parameter.dtype
        # Narrow before the transfer and widen after it. Memory that will be reused is copied first.
        narrow = dtype if dtype.itemsize < values.dtype.itemsize else values.dtype
        if not in_place or narrow != values.dtype:
            copy = aligned_empty(values.size * narrow.itemsize).view(narrow).reshape(values.shape)
            np.copyto(copy, values, casting="unsafe")
            values = copy
        updates = [jax.device_put(values, device) for device in self.shard.devices]
        if blocks is not None:
            updates = [_dequantize(update, *jax.device_put(blocks, update.device), dtype=dtype) for update in updates]
        with self._lock:
            if box == self.shard.box:
                self._arrays = [update.astype(dtype) for update in updates]
            else:
                start = tuple(start - origin for (start, _), (origin, _) in zip(box, self.shard.box, strict=True))
                arrays = self._arrays or self._zeros()
                self._arrays = [_update(array, update, start) for array, update in zip(arrays, updates, strict=True)]
            # The chunk's host memory counts against the budget until the transfer is complete.
            jax.block_until_ready(self._arrays)

    def _zeros(self) -> list[jax.Array]:
        shape = box_shape(self.shard.box)
        return [jnp.zeros(shape, self.parameter.dtype, device=device) for device in self.shard.devices]

    def arrays(self) -> list[jax.Array]:
        return self._arrays or self._zeros()


class HostArrayBuilder:
    """Host memory for all shards of a parameter: one allocation, so that the system can use huge pages.

    The memory is allocated at the first write.
    """

    def __init__(self, parameter: Parameter):
        self._parameter, self._lock = parameter, threading.Lock()
        self._memory: np.ndarray | None = None
        self._starts: dict[Box, int] = {}
        self._size = 0
        for shard in parameter.shards:
            self._starts[shard.box] = self._size
            nbytes = math.prod(box_shape(shard.box)) * parameter.dtype.itemsize
            self._size += nbytes + -nbytes % BUFFER_ALIGNMENT
        self.buffers = [HostBuffer(parameter, shard, self) for shard in parameter.shards]

    def values(self, box: Box) -> np.ndarray:
        with self._lock:
            if self._memory is None:
                self._memory = aligned_empty(self._size)
        shape, dtype, start = box_shape(box), self._parameter.dtype, self._starts[box]
        return self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def build(self) -> jax.Array:
        shape = self._parameter.shape

        def values(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return self.values(box_from_slices(index, shape))

        # One call for all shards takes a fifth of the time of one `device_put` per shard.
        return jax.make_array_from_callback(shape, self._parameter.sharding, values)


class DeviceArrayBuilder:
    """The shards of a parameter on accelerators."""

    def __init__(self, parameter: Parameter):
        self._parameter = parameter
        self.buffers = [DeviceBuffer(parameter, shard) for shard in parameter.shards]

    def build(self) -> jax.Array:
        arrays = [array for buffer in self.buffers for array in buffer.arrays()]
        return jax.make_array_from_single_device_arrays(self._parameter.shape, self._parameter.sharding, arrays)


class EncodingBuffer:
    """Encodes the chunks of a source (see `packed`) and writes them to the arrays of its weight.

    Values that contradict the configuration are noted in `problems`, so that one error can list them all.
    """

    def __init__(
        self, parameter: Parameter, shard: Shard, buffers: Mapping[str, Sequence[ShardBuffer]], problems: set[str]
    ):
        self.parameter, self.shard, self._buffers, self._problems = parameter, shard, buffers, problems

    def view_for(self, chunk: Chunk) -> None:
        return None

    def write(self, box: Box, values: np.ndarray, blocks: BlockScales | None, *, in_place: bool) -> None:
        assert self.parameter.source is not None
        try:
            encoded = self.parameter.source.encode_box(box, values, blocks)
        except CheckpointError as error:
            self._problems.add(str(error))
            return
        for suffix, of_array, array in encoded:
            for buffer in self._buffers[suffix]:
                common = intersect(of_array, buffer.shard.box)
                if common is not None:
                    buffer.write(common, array[relative_slices(common, of_array)], None, in_place=False)


def make_array_builder(parameter: Parameter) -> HostArrayBuilder | DeviceArrayBuilder:
    """Return the builder that the chunks of a parameter are written to."""
    return HostArrayBuilder(parameter) if is_on_host(parameter) else DeviceArrayBuilder(parameter)


def is_on_host(parameter: Parameter) -> bool:
    """Return whether the parameter's arrays are in host memory, so that their buffers can be filled directly."""
    return all(device.platform == "cpu" for shard in parameter.shards for device in shard.devices)


def aligned_empty(nbytes: int) -> np.ndarray:
    """Return new uninitialised bytes that jax's CPU backend adopts without a copy.

    Large buffers come from mmap: malloc would keep their memory after they are freed.
    """
    if nbytes >= _LARGE_BYTES:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)
    memory = np.empty(nbytes + BUFFER_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % BUFFER_ALIGNMENT
    return memory[start : start + nbytes]
