"""What this process reads, where it goes and what that costs: pure arithmetic on headers, names and shardings.

Words used throughout:
- a *box* is one (start, stop) per dimension of a parameter;
- a *shard* is the box a device holds; devices that hold the same box share it, so that replicated bytes are read once;
- a *piece* is a box small enough to be held in memory, lying within one tensor on disk;
- a *read* is a byte range of a file, with the pieces it brings.
"""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwen_dist.checkpoint.boxes import (
    Box,
    box_of,
    box_shape,
    first_index,
    flat_indices,
    merge,
    run_dim,
    run_length,
    split,
    widen,
)
from qwen_dist.checkpoint.format import DTYPES, TensorInfo
from qwen_dist.checkpoint.mapping import NameMap, Segment
from qwen_dist.checkpoint.quantized import FP8_DTYPES, SCALE_DTYPES, scale_shape
from qwen_dist.errors import CheckpointError

# A shard whose bytes lie in runs at least this long is read straight to where it belongs. One with shorter runs (a column
# shard) is read as whole rows together with its neighbours, and divided in memory.
LONG_RUN_BYTES = 256 * 1024
# Neighbouring pieces below this size share one read.
SMALL_PIECE_BYTES = 256 * 1024
# A thread holds the piece it reads and, while it divides, casts or dequantises it, at most one copy of the same size
# (pieces whose copy would be larger are planned smaller).
COPIES_PER_PIECE = 2
# Among these a value is converted: widened exactly, or rounded once.
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class Shard:
    """A box of a parameter and the local devices that hold it."""

    box: Box
    devices: tuple[jax.Device, ...]


@dataclass(frozen=True, eq=False)
class Parameter:
    """One array to be loaded and where its bytes are.

    Attributes:
        name, shape, dtype, sharding: as the model declares them.
        disk_dtype: the dtype of its tensors on disk.
        segments: its parts on disk in row-major order.
        stack_dims: how many leading dimensions count the segments; 0 for a view.
        shards: what the devices of this process hold of it.
        block: the block size of quantised weights, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any
    disk_dtype: np.dtype
    segments: tuple[Segment, ...]
    stack_dims: int
    shards: tuple[Shard, ...]
    block: tuple[int, int] | None = None

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of this process's shards on disk, each once: the least that any plan could read."""
        return sum(math.prod(box_shape(shard.box)) for shard in self.shards) * self.disk_dtype.itemsize

    def matrix_indices(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """The rows and columns of the tensor on disk (its last two dimensions) that a box within one segment takes."""
        dims = range(self.stack_dims, len(self.shape))
        segment = self.segments[0]
        rows = segment.size // segment.shape[-1]
        cut = next(dim for dim in dims if math.prod(self.shape[self.stack_dims : dim + 1]) == rows) + 1
        start = self.segments[self.segment_of(box)].start // segment.shape[-1] % segment.shape[-2]
        return start + flat_indices(box, self.shape, self.stack_dims, cut), flat_indices(
            box, self.shape, cut, len(self.shape)
        )

    def segment_of(self, box: Box) -> int:
        """The index of the segment that a box lies in."""
        return first_index(box, self.shape) // self.segments[0].size


@dataclass(frozen=True)
class Piece:
    """A box of a parameter that lies within one tensor on disk."""

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
        """Length of the contiguous byte ranges that the piece has in the file."""
        return run_length(self.box, self.parameter.shape) * self.parameter.disk_dtype.itemsize

    def offsets(self) -> Iterator[int]:
        """Byte offsets in the file of the piece's runs, in row-major order of its box."""
        shape, itemsize = self.parameter.shape, self.parameter.disk_dtype.itemsize
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        segment = self.parameter.segments[self.parameter.segment_of(self.box)]
        within = first_index(self.box, shape) % segment.size
        base = self.tensor.begin + (segment.start + within) * itemsize
        outer = [range(stop - start) for start, stop in self.box[: run_dim(self.box, shape)]]
        for position in itertools.product(*outer):
            yield base + sum(i * stride for i, stride in zip(position, strides, strict=False)) * itemsize

    def scale_rows(self) -> tuple[int, int]:
        """The rows of the scale, as a matrix, that belong to the rows of a quantised piece."""
        assert self.scale is not None and self.parameter.block is not None
        rows, _ = self.parameter.matrix_indices(self.box)
        segment = self.parameter.segments[self.parameter.segment_of(self.box)]
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
class Read:
    """Bytes [begin, end) of a file and the pieces they bring; a single piece may take only its runs out of them."""

    file: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are really read, with the scales."""
        data = self.pieces[0].nbytes if len(self.pieces) == 1 else self.end - self.begin
        return data + sum(piece.scale_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """Everything one process does to load a checkpoint.

    Attributes:
        parameters: the arrays to be made, by name.
        reads: what to read, in the order of the files.
        names: the mapping of names, with what is skipped.
        piece_bytes: the largest piece.
        num_threads: how many reads are under way at a time.
        check_bytes: what the comparison of a stored head with its embedding reads.
        digest: the same on every process that loads the same checkpoint onto the same mesh.
    """

    parameters: tuple[Parameter, ...]
    reads: tuple[Read, ...]
    names: NameMap
    piece_bytes: int
    num_threads: int
    check_bytes: int
    digest: str

    @property
    def bytes_read(self) -> int:
        return sum(read.nbytes for read in self.reads) + self.check_bytes

    @property
    def bytes_needed(self) -> int:
        return sum(parameter.nbytes_on_disk for parameter in self.parameters)

    @property
    def over_read(self) -> float:
        """Bytes read over the least possible; 1.0 is perfect."""
        return self.bytes_read / max(1, self.bytes_needed)

    @property
    def host_memory(self) -> int:
        """The most bytes of buffers held at a time, beyond arrays that live on the host themselves."""
        return COPIES_PER_PIECE * self.piece_bytes * self.num_threads

    def bytes_per_device(self) -> dict[jax.Device, int]:
        """What each local device holds in the end."""
        totals: dict[jax.Device, int] = defaultdict(int)
        for parameter in self.parameters:
            for shard in parameter.shards:
                for device in shard.devices:
                    totals[device] += math.prod(box_shape(shard.box)) * parameter.dtype.itemsize
        return dict(sorted(totals.items(), key=lambda item: item[0].id))

    def __str__(self) -> str:
        per_device = self.bytes_per_device().values()
        files = {read.file for read in self.reads}
        return (
            f"{len(self.parameters)} parameters from {len(files)} files in {len(self.reads)} reads: "
            f"{self.bytes_read / 1e9:.3f} GB read ({self.over_read:.3f} x the least), "
            f"{min(per_device) / 1e9:.3f}-{max(per_device) / 1e9:.3f} GB on each of {len(per_device)} local devices, "
            f"at most {self.host_memory / 1e6:.0f} MB of host buffers, {len(self.names.skipped)} tensors skipped, "
            f"plan {self.digest[:12]}"
        )


def make_parameters(
    target: Mapping[str, jax.ShapeDtypeStruct],
    names: NameMap,
    tensors: Mapping[str, TensorInfo],
    block: tuple[int, int] | None,
) -> tuple[Parameter, ...]:
    """Binds names, tensors on disk and shardings, in sorted order.

    Raises:
        CheckpointError: a tensor's dtype cannot become the parameter's, a scale does not fit its weight, or a shape does
            not divide by its sharding; all of them in one message.
    """
    parameters, problems = [], []
    for name in sorted(target):
        struct, segments = target[name], names.segments[name]
        parts = [tensors[segment.tensor] for segment in segments]
        scales = [tensors[names.scales[part.name]] if part.name in names.scales else None for part in parts]
        if problem := _dtype_problem(parts, scales, np.dtype(struct.dtype), block):
            problems.append(f"{parts[0].name}: {problem}")
            continue
        try:
            shards = make_shards(struct.shape, struct.sharding)
        except ValueError as error:  # jax says which dimension does not divide by which axis
            problems.append(f"{name}: {error}")
            continue
        assert parts[0].dtype.numpy is not None
        parameters.append(
            Parameter(
                name,
                tuple(struct.shape),
                np.dtype(struct.dtype),
                struct.sharding,
                parts[0].dtype.numpy,
                segments,
                stack_dims(name, struct.shape, len(segments)),
                shards,
                block if scales[0] is not None else None,
            )
        )
    if problems:
        raise CheckpointError("Parameters that cannot be loaded:\n" + "\n".join(f"  - {text}" for text in problems))
    return tuple(parameters)


def _dtype_problem(
    parts: list[TensorInfo], scales: list[TensorInfo | None], wanted: np.dtype, block: tuple[int, int] | None
) -> str | None:
    """Why these tensors cannot become an array of dtype `wanted`; None if they can."""
    dtypes = sorted({part.dtype.name for part in parts})
    disk = parts[0].dtype
    wanted_is_float = any(wanted == DTYPES[name].numpy for name in FLOAT_DTYPES)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        return f"{wanted} arrays need jax_enable_x64"
    if len(dtypes) > 1:
        return f"its parts have different dtypes: {', '.join(dtypes)}"
    if disk.numpy is None:
        return f"dtype {disk.name} is known, but loading it is not supported"
    if any(scale is not None for scale in scales):
        return _scale_problem(parts, scales, block) if wanted_is_float else f"FP8 cannot become {wanted}"
    if disk.numpy == wanted or (disk.name in FLOAT_DTYPES and wanted_is_float):
        return None
    hint = "; its weight_scale_inv is missing" if disk.name in FP8_DTYPES else ""
    return f"dtype {disk.name} on disk is never converted to {wanted}{hint}"


def _scale_problem(parts: list[TensorInfo], scales: list[TensorInfo | None], block: tuple[int, int] | None) -> str | None:
    for part, scale in zip(parts, scales, strict=True):
        if scale is None:
            return f"{part.name} has no scale though other parts have one"
        if part.dtype.name not in FP8_DTYPES:
            return f"{scale.name} would go unused: the weight is {part.dtype.name}, not FP8"
        if block is None:
            return f"{scale.name} is there, but config.json has no quantization_config to say its block size"
        if len(part.shape) < 2 or scale.shape != scale_shape(part.shape, block) or scale.dtype.name not in SCALE_DTYPES:
            return (
                f"{scale.name} is {scale.dtype.name} {list(scale.shape)}; blocks of {list(block)} over "
                f"{list(part.shape)} need {list(scale_shape(part.shape, block))}"
            )
    return None


def stack_dims(name: str, shape: tuple[int, ...], num_segments: int) -> int:
    """How many leading dimensions of a parameter count its segments on disk."""
    if num_segments == 1:
        return 0
    for dims in range(1, len(shape)):
        if math.prod(shape[:dims]) == num_segments:
            return dims
    raise ValueError(f"{name}: no leading dimensions of {list(shape)} count its {num_segments} tensors on disk")


def make_shards(shape: tuple[int, ...], sharding: Any) -> tuple[Shard, ...]:
    """The distinct boxes that this process's devices hold, each with its devices."""
    holders: dict[Box, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        holders[box_of(index, shape)].append(device)
    return tuple(Shard(box, tuple(devices)) for box, devices in sorted(holders.items()))


def make_reads(
    parameters: Iterable[Parameter],
    names: NameMap,
    tensors: Mapping[str, TensorInfo],
    *,
    piece_bytes: int,
    max_gap: int,
) -> tuple[Read, ...]:
    """Divides every parameter into pieces of at most `piece_bytes` and joins small neighbours, in file order.

    `max_gap` is the number of bytes that are cheaper to read and drop than to skip.
    """
    pieces = []
    for parameter in parameters:
        # float32 values, float32 factors, their product and its rounding: 14 bytes for one of FP8.
        limit = piece_bytes if parameter.block is None else piece_bytes // 8
        for box in make_pieces(parameter, piece_bytes=limit, max_gap=max_gap):
            tensor = parameter.segments[parameter.segment_of(box)].tensor
            scale = tensors[names.scales[tensor]] if parameter.block is not None else None
            pieces.append(Piece(parameter, box, tensors[tensor], scale))
    reads: list[Read] = []
    for piece in sorted(pieces, key=lambda piece: (piece.tensor.file, next(piece.offsets()))):
        begin = next(piece.offsets())
        read = Read(piece.tensor.file, begin, begin + piece.nbytes, (piece,))
        joined = _join_reads(reads[-1], read, piece_bytes, max_gap) if reads else None
        if joined is not None:
            reads[-1] = joined
        else:
            reads.append(read)
    return tuple(reads)


def _join_reads(last: Read, read: Read, piece_bytes: int, max_gap: int) -> Read | None:
    end = max(last.end, read.end)
    is_near = last.file == read.file and read.begin - last.end <= max_gap and end - last.begin <= piece_bytes
    if not (is_near and _is_joinable(last.pieces[0]) and _is_joinable(read.pieces[0])):
        return None
    return Read(last.file, last.begin, end, (*last.pieces, *read.pieces))


def _is_joinable(piece: Piece) -> bool:
    return piece.nbytes <= SMALL_PIECE_BYTES and piece.run_bytes == piece.nbytes and piece.scale is None


def make_pieces(parameter: Parameter, *, piece_bytes: int, max_gap: int) -> Iterator[Box]:
    """Boxes of at most `piece_bytes` that together hold all local shards of a parameter."""
    itemsize = parameter.disk_dtype.itemsize
    boxes = [shard.box for shard in parameter.shards if math.prod(box_shape(shard.box))]
    if any(run_length(box, parameter.shape) * itemsize < LONG_RUN_BYTES for box in boxes):
        boxes = [widen(box, parameter.shape, max_gap // itemsize) for box in merge(boxes)]
    for box in boxes:
        yield from split(box, piece_bytes // itemsize, parameter.stack_dims)


def make_digest(parameters: Iterable[Parameter], tensors: Mapping[str, TensorInfo]) -> str:
    """A hash of all that the processes of one load must agree on."""
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
