"""Plan a load: which bytes this process reads and which shards they belong to, from headers, names and shardings alone.

- A *box* is a rectangular part of a parameter: one (start, stop) per dimension.
- A *shard* is the box that a device holds. Devices with the same box share one shard, so that its bytes are read once.
- A *chunk* is a box within one tensor on disk, small enough for the memory budget.
- A *read request* is a byte range of a file and the chunks in it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwen_dist.checkpoint.boxes import (
    Box,
    box_from_slices,
    box_shape,
    first_flat_index,
    flat_indices,
    merge_boxes,
    run_dim,
    run_length,
    split_box,
    widen_box,
)
from qwen_dist.checkpoint.fp8 import FP8_DTYPES, SCALE_DTYPES, scale_shape
from qwen_dist.checkpoint.names import NameMap, Segment
from qwen_dist.checkpoint.packed import Source
from qwen_dist.checkpoint.safetensors import DTYPES, TensorInfo
from qwen_dist.errors import CheckpointError, problem_list

# A shard whose contiguous runs on disk are at least this long is read directly into its buffer. A shard with shorter runs
# (a column shard) is read as whole rows together with its neighbours, and divided in memory.
LONG_RUN_BYTES = 256 * 1024
# Adjacent chunks up to this size share one read request.
SMALL_CHUNK_BYTES = 256 * 1024
# A thread holds the chunk that it reads and at most one copy of the same size, while it divides, casts or dequantises it.
# (Chunks whose copy would be larger are planned smaller.)
COPIES_PER_CHUNK = 2
# Values are converted between these dtypes: widened exactly, or rounded once.
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class Shard:
    """A box of a parameter and the local devices that hold it."""

    box: Box
    devices: tuple[jax.Device, ...]


@dataclass(frozen=True, eq=False)
class Parameter:
    """An array to load, and where its bytes are on disk.

    Attributes:
      name, shape, dtype, sharding: as declared by the model.
      disk_dtype: dtype of its tensors on disk.
      segments: where it is on disk, in row-major order.
      num_stack_dims: number of leading dimensions that enumerate the segments; 0 for a view.
      shards: its shards on the devices of this process.
      block: block size (rows, columns) of quantised weights, else None.
      source: how its values become arrays of a weight that is kept quantised; None: it is itself an array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any
    disk_dtype: np.dtype
    segments: tuple[Segment, ...]
    num_stack_dims: int
    shards: tuple[Shard, ...]
    block: tuple[int, int] | None = None
    source: Source | None = None

    @property
    def expansion(self) -> int:
        """Into how much smaller chunks it is cut, because of the memory that a chunk takes until it is written.

        Dequantising takes 14 bytes per FP8 byte: float32 values, scales and product, and the rounded result. Quantising
        takes as much again.
        """
        return (1 if self.block is None else 8) * (1 if self.source is None else 8 if self.block is None else 2)

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes on disk of this process's shards, counted once: the minimum that any plan has to read."""
        return sum(math.prod(box_shape(shard.box)) for shard in self.shards) * self.disk_dtype.itemsize

    def matrix_indices(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and columns in the tensor on disk (its last two dimensions) of a box within one segment."""
        dims = range(self.num_stack_dims, len(self.shape))
        segment = self.segments[0]
        rows = segment.size // segment.shape[-1]
        cut = next(dim for dim in dims if math.prod(self.shape[self.num_stack_dims : dim + 1]) == rows) + 1
        start = self.segments[self.segment_index(box)].start // segment.shape[-1] % segment.shape[-2]
        return start + flat_indices(box, self.shape, self.num_stack_dims, cut), flat_indices(
            box, self.shape, cut, len(self.shape)
        )

    def segment_index(self, box: Box) -> int:
        """Return the index of the segment that contains a box."""
        return first_flat_index(box, self.shape) // self.segments[0].size


@dataclass(frozen=True)
class Chunk:
    """A box of a parameter within one tensor on disk; `scale` is the tensor of its scales, if it is quantised."""

    parameter: Parameter
    box: Box
    tensor: TensorInfo
    scale: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return box_shape(self.box)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.parameter.disk_dtype.itemsize

    @property
    def run_bytes(self) -> int:
        """Length of the chunk's contiguous byte ranges in the file."""
        return run_length(self.box, self.parameter.shape) * self.parameter.disk_dtype.itemsize

    def offsets(self) -> Iterator[int]:
        """Yield the byte offsets of the chunk's contiguous runs in the file, in row-major order of its box."""
        shape, itemsize = self.parameter.shape, self.parameter.disk_dtype.itemsize
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        segment = self.parameter.segments[self.parameter.segment_index(self.box)]
        within = first_flat_index(self.box, shape) % segment.size
        base = self.tensor.begin + (segment.start + within) * itemsize
        outer = [range(stop - start) for start, stop in self.box[: run_dim(self.box, shape)]]
        for position in itertools.product(*outer):
            yield base + sum(i * stride for i, stride in zip(position, strides, strict=False)) * itemsize

    def scale_rows(self) -> tuple[int, int]:
        """Return the (start, stop) rows of the scale, as a matrix, that belong to the rows of a quantised chunk."""
        assert self.scale is not None and self.parameter.block is not None
        rows, _ = self.parameter.matrix_indices(self.box)
        segment = self.parameter.segments[self.parameter.segment_index(self.box)]
        matrix = segment.start // math.prod(segment.shape[-2:])
        first = matrix * self.scale.shape[-2]
        return first + int(rows[0]) // self.parameter.block[0], first + int(rows[-1]) // self.parameter.block[0] + 1

    @property
    def scale_bytes(self) -> int:
        if self.scale is None:
            return 0
        start, stop = self.scale_rows()
        return (stop - start) * self.scale.nbytes // math.prod(self.scale.shape[:-1])


@dataclass(frozen=True)
class ReadRequest:
    """Bytes [begin, end) of a file and the chunks in them. Of a single chunk, only its runs are read."""

    file: str
    begin: int
    end: int
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read, including scales."""
        data = self.chunks[0].nbytes if len(self.chunks) == 1 else self.end - self.begin
        return data + sum(chunk.scale_bytes for chunk in self.chunks)


@dataclass(frozen=True)
class LoadPlan:
    """Everything that one process does to load a checkpoint.

    Attributes:
      parameters: what is read, sorted by name: arrays, and sources of arrays that are kept quantised.
      packed: the arrays of each weight that is kept quantised, by their suffix; they are made of sources.
      requests: what to read, in file order.
      names: the tensors of each parameter, and the tensors that are skipped.
      chunk_bytes: maximum size of a chunk.
      num_threads: number of concurrent reads.
      tied_head_bytes: bytes read to compare a stored tied head with the embedding.
      digest: a hash; equal on all processes that load the same checkpoint onto the same mesh.
    """

    parameters: tuple[Parameter, ...]
    packed: Mapping[str, Mapping[str, Parameter]]
    requests: tuple[ReadRequest, ...]
    names: NameMap
    chunk_bytes: int
    num_threads: int
    tied_head_bytes: int
    digest: str

    @property
    def arrays(self) -> tuple[Parameter, ...]:
        """The arrays that are made."""
        packed = (array for of_weight in self.packed.values() for array in of_weight.values())
        return (*(parameter for parameter in self.parameters if parameter.source is None), *packed)

    @property
    def bytes_read(self) -> int:
        return sum(request.nbytes for request in self.requests) + self.tied_head_bytes

    @property
    def bytes_needed(self) -> int:
        return sum(parameter.nbytes_on_disk for parameter in self.parameters)

    @property
    def over_read(self) -> float:
        """Bytes read divided by the minimum; 1.0 is optimal."""
        return self.bytes_read / max(1, self.bytes_needed)

    @property
    def host_memory_bytes(self) -> int:
        """Maximum bytes of buffers held at a time, not counting arrays that are in host memory themselves."""
        return COPIES_PER_CHUNK * self.chunk_bytes * self.num_threads

    def bytes_per_device(self) -> dict[jax.Device, int]:
        """Return the bytes that each local device holds after the load."""
        totals: dict[jax.Device, int] = defaultdict(int)
        for parameter in self.arrays:
            for shard in parameter.shards:
                for device in shard.devices:
                    totals[device] += math.prod(box_shape(shard.box)) * parameter.dtype.itemsize
        return dict(sorted(totals.items(), key=lambda item: item[0].id))

    def __str__(self) -> str:
        per_device = self.bytes_per_device().values()
        files = {request.file for request in self.requests}
        return (
            f"{len(self.arrays)} parameters from {len(files)} files in {len(self.requests)} reads: "
            f"{self.bytes_read / 1e9:.3f} GB read ({self.over_read:.3f} x the minimum), "
            f"{min(per_device) / 1e9:.3f}-{max(per_device) / 1e9:.3f} GB on each of {len(per_device)} local devices, "
            f"at most {self.host_memory_bytes / 1e6:.0f} MB of host buffers, {len(self.names.skipped)} tensors skipped, "
            f"plan {self.digest[:12]}"
        )


def make_parameters(
    target: Mapping[str, jax.ShapeDtypeStruct],
    names: NameMap,
    tensors: Mapping[str, TensorInfo],
    block: tuple[int, int] | None,
    sources: Mapping[str, Source] = types.MappingProxyType({}),
) -> tuple[Parameter, ...]:
    """Combine the target with its tensors on disk, sorted by name. `sources` has those parameters that are sources.

    Raises:
      CheckpointError: a tensor's dtype cannot be converted to the parameter's, a scale does not fit its weight, or a
        sharding does not divide a shape; one message lists every problem.
    """
    parameters, problems = [], []
    for name in sorted(target):
        struct, segments = target[name], names.segments[name]
        stored = [tensors[segment.tensor] for segment in segments]
        scales = [tensors[names.scales[tensor.name]] if tensor.name in names.scales else None for tensor in stored]
        if problem := _dtype_problem(stored, scales, np.dtype(struct.dtype), block):
            problems.append(f"{stored[0].name}: {problem}")
            continue
        try:
            shards = make_shards(struct.shape, struct.sharding)
        except ValueError as error:  # jax names the dimension and the mesh axis that does not divide it
            problems.append(f"{name}: {error}")
            continue
        assert stored[0].dtype.numpy is not None
        parameters.append(
            Parameter(
                name,
                tuple(struct.shape),
                np.dtype(struct.dtype),
                struct.sharding,
                stored[0].dtype.numpy,
                segments,
                count_stack_dims(name, struct.shape, len(segments)),
                shards,
                block if scales[0] is not None else None,
                sources.get(name),
            )
        )
    if problems:
        raise CheckpointError("Parameters that cannot be loaded:\n" + problem_list(problems))
    return tuple(parameters)


def make_result(name: str, struct: jax.ShapeDtypeStruct) -> Parameter:
    """Return an array that is computed from sources: it has shards, and no tensor on disk."""
    dtype, shards = np.dtype(struct.dtype), make_shards(struct.shape, struct.sharding)
    return Parameter(name, tuple(struct.shape), dtype, struct.sharding, dtype, (), 0, shards)


def _dtype_problem(
    stored: list[TensorInfo], scales: list[TensorInfo | None], target: np.dtype, block: tuple[int, int] | None
) -> str | None:
    """Return why these tensors cannot become an array of dtype `target`, or None if they can."""
    dtypes = sorted({tensor.dtype.name for tensor in stored})
    disk = stored[0].dtype
    is_float = any(target == DTYPES[name].numpy for name in FLOAT_DTYPES)
    if jax.dtypes.canonicalize_dtype(target) != target:
        return f"{target} arrays need jax_enable_x64"
    if len(dtypes) > 1:
        return f"its tensors have different dtypes: {', '.join(dtypes)}"
    if disk.numpy is None:
        return f"dtype {disk.name} is known, but loading it is not supported"
    if any(scale is not None for scale in scales):
        is_kept = disk.numpy == target
        return _scale_problem(stored, scales, block) if is_float or is_kept else f"FP8 cannot be converted to {target}"
    if disk.numpy == target or (disk.name in FLOAT_DTYPES and is_float):
        return None
    hint = "; its weight_scale_inv is missing" if disk.name in FP8_DTYPES else ""
    return f"dtype {disk.name} on disk is never converted to {target}{hint}"


def _scale_problem(weights: list[TensorInfo], scales: list[TensorInfo | None], block: tuple[int, int] | None) -> str | None:
    for weight, scale in zip(weights, scales, strict=True):
        if scale is None:
            return f"{weight.name} has no scale but other tensors of the parameter have one"
        if weight.dtype.name not in FP8_DTYPES:
            return f"{scale.name} would go unused: the weight is {weight.dtype.name}, not FP8"
        if block is None:
            return f"there is a {scale.name}, but config.json has no quantization_config with its block size"
        if len(weight.shape) < 2 or scale.shape != scale_shape(weight.shape, block) or scale.dtype.name not in SCALE_DTYPES:
            return (
                f"{scale.name} is {scale.dtype.name} {list(scale.shape)}; blocks of {list(block)} over "
                f"{list(weight.shape)} need {list(scale_shape(weight.shape, block))}"
            )
    return None


def count_stack_dims(name: str, shape: tuple[int, ...], num_segments: int) -> int:
    """Return the number of leading dimensions of a parameter that enumerate its segments on disk."""
    if num_segments == 1:
        return 0
    for dims in range(1, len(shape)):
        if math.prod(shape[:dims]) == num_segments:
            return dims
    raise ValueError(f"{name} has {num_segments} tensors on disk; no leading dimensions of {list(shape)} enumerate them")


def make_shards(shape: tuple[int, ...], sharding: Any) -> tuple[Shard, ...]:
    """Return the distinct boxes that this process's devices hold, each with its devices."""
    holders: dict[Box, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        holders[box_from_slices(index, shape)].append(device)
    return tuple(Shard(box, tuple(devices)) for box, devices in sorted(holders.items()))


def make_read_requests(
    parameters: Iterable[Parameter],
    names: NameMap,
    tensors: Mapping[str, TensorInfo],
    *,
    chunk_bytes: int,
    max_gap: int,
) -> tuple[ReadRequest, ...]:
    """Split every parameter into chunks of at most `chunk_bytes` and join small adjacent ones, in file order.

    `max_gap` is the number of bytes that are cheaper to read and discard than to skip.
    """
    chunks = []
    for parameter in parameters:
        limit = chunk_bytes // parameter.expansion
        for box in chunk_boxes(parameter, chunk_bytes=limit, max_gap=max_gap):
            tensor = parameter.segments[parameter.segment_index(box)].tensor
            scale = tensors[names.scales[tensor]] if parameter.block is not None else None
            chunks.append(Chunk(parameter, box, tensors[tensor], scale))
    requests: list[ReadRequest] = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.tensor.file, next(chunk.offsets()))):
        begin = next(chunk.offsets())
        request = ReadRequest(chunk.tensor.file, begin, begin + chunk.nbytes, (chunk,))
        joined = _join_requests(requests[-1], request, chunk_bytes, max_gap) if requests else None
        if joined is not None:
            requests[-1] = joined
        else:
            requests.append(request)
    return tuple(requests)


def _join_requests(last: ReadRequest, request: ReadRequest, chunk_bytes: int, max_gap: int) -> ReadRequest | None:
    end = max(last.end, request.end)
    is_near = last.file == request.file and request.begin - last.end <= max_gap and end - last.begin <= chunk_bytes
    if not (is_near and _is_joinable(last.chunks[0]) and _is_joinable(request.chunks[0])):
        return None
    return ReadRequest(last.file, last.begin, end, (*last.chunks, *request.chunks))


def _is_joinable(chunk: Chunk) -> bool:
    return chunk.nbytes <= SMALL_CHUNK_BYTES and chunk.run_bytes == chunk.nbytes and chunk.scale is None


def chunk_boxes(parameter: Parameter, *, chunk_bytes: int, max_gap: int) -> Iterator[Box]:
    """Yield boxes of at most `chunk_bytes` that together cover all local shards of a parameter."""
    itemsize = parameter.disk_dtype.itemsize
    boxes = [shard.box for shard in parameter.shards if math.prod(box_shape(shard.box))]
    if any(run_length(box, parameter.shape) * itemsize < LONG_RUN_BYTES for box in boxes):
        boxes = [widen_box(box, parameter.shape, max_gap // itemsize) for box in merge_boxes(boxes)]
    for box in boxes:
        whole = () if parameter.source is None else parameter.source.whole
        yield from split_box(box, chunk_bytes // itemsize, parameter.num_stack_dims, whole)


def make_digest(parameters: Iterable[Parameter], tensors: Mapping[str, TensorInfo]) -> str:
    """Return a hash of everything that must be equal on all processes of one load."""
    digest = hashlib.sha256()
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.name):
        digest.update(repr((tensor.name, tensor.file, tensor.dtype.name, tensor.shape, tensor.begin)).encode())
    meshes: dict[Any, str] = {}
    for parameter in parameters:
        sharding = parameter.sharding
        placement: object = sorted(device.id for device in sharding.device_set)
        if isinstance(sharding, NamedSharding):
            if sharding.mesh not in meshes:
                ids = [(device.id, device.process_index) for device in sharding.mesh.devices.flat]
                meshes[sharding.mesh] = repr((sharding.mesh.shape, ids))
            placement = (meshes[sharding.mesh], tuple(sharding.spec))
        digest.update(repr((parameter.name, parameter.shape, str(parameter.dtype), placement)).encode())
    return digest.hexdigest()
