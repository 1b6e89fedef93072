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
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_dist.checkpoint.format import DTYPES, TensorInfo
from qwen_dist.checkpoint.mapping import NameMap, Segment
from qwen_dist.errors import CheckpointError

if TYPE_CHECKING:
    import jax

Box = tuple[tuple[int, int], ...]

# A shard whose bytes lie in runs at least this long is read straight to where it belongs. One with shorter runs (a column
# shard) is read as whole rows together with its neighbours, and divided in memory.
LONG_RUN_BYTES = 256 * 1024
# Neighbouring pieces below this size share one read.
SMALL_PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Shard:
    """A box of a parameter and the local devices that hold it."""

    box: Box
    devices: tuple["jax.Device", ...]


@dataclass(frozen=True, eq=False)
class Parameter:
    """One array to be loaded and where its bytes are.

    Attributes:
        name, shape, dtype, sharding: as the model declares them.
        disk_dtype: the dtype of its tensors on disk.
        segments: its parts on disk in row-major order.
        stack_dims: how many leading dimensions count the segments; 0 for a view.
        shards: what the devices of this process hold of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any
    disk_dtype: np.dtype
    segments: tuple[Segment, ...]
    stack_dims: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a parameter that lies within one tensor on disk."""

    parameter: Parameter
    box: Box
    tensor: TensorInfo

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
        first = sum(start * stride for (start, _), stride in zip(self.box, strides, strict=True))
        index, within = divmod(first, self.parameter.segments[0].size)
        base = self.tensor.begin + (self.parameter.segments[index].start + within) * itemsize
        outer = [range(stop - start) for start, stop in self.box[: _run_dim(self.box, shape)]]
        for position in itertools.product(*outer):
            yield base + sum(i * stride for i, stride in zip(position, strides, strict=False)) * itemsize


@dataclass(frozen=True)
class Read:
    """Bytes [begin, end) of a file. A read of several pieces, or of a piece with one run, takes all of the range."""

    file: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are really read."""
        return self.pieces[0].nbytes if len(self.pieces) == 1 else self.end - self.begin


@dataclass(frozen=True)
class Plan:
    """Everything one process does to load a checkpoint.

    Attributes:
        parameters: the arrays to be made.
        reads: what to read, in the order of the files.
        names: the mapping of names, with what is skipped.
        piece_bytes: the largest piece.
    """

    parameters: tuple[Parameter, ...]
    reads: tuple[Read, ...]
    names: NameMap
    piece_bytes: int

    @property
    def bytes_read(self) -> int:
        return sum(read.nbytes for read in self.reads)

    @property
    def bytes_needed(self) -> int:
        """The least any plan could read: every byte of this process's shards once."""
        return sum(
            math.prod(box_shape(shard.box)) * parameter.disk_dtype.itemsize
            for parameter in self.parameters
            for shard in parameter.shards
        )


def make_parameters(
    target: Mapping[str, "jax.ShapeDtypeStruct"], names: NameMap, tensors: Mapping[str, TensorInfo]
) -> tuple[Parameter, ...]:
    """Binds names, tensors on disk and shardings, in sorted order.

    Raises:
        CheckpointError: a tensor's dtype cannot become the parameter's; all of them in one message.
    """
    parameters, problems = [], []
    for name in sorted(target):
        struct, segments = target[name], names.segments[name]
        dtypes = {tensors[segment.tensor].dtype for segment in segments}
        dtype = np.dtype(struct.dtype)
        if problem := _dtype_problem(dtypes, dtype):
            problems.append(f"{segments[0].tensor}: {problem}")
            continue
        (disk,) = dtypes
        stack_dims = _stack_dims(name, struct.shape, len(segments))
        shards = make_shards(struct.shape, struct.sharding)
        parameters.append(
            Parameter(name, tuple(struct.shape), dtype, struct.sharding, disk.numpy, segments, stack_dims, shards)
        )
    if problems:
        raise CheckpointError("Tensors of a dtype that cannot be loaded:\n" + "\n".join(f"  - {p}" for p in problems))
    return tuple(parameters)


_FLOATS = {"F16", "BF16", "F32", "F64"}


def _dtype_problem(dtypes: set[Any], wanted: np.dtype) -> str | None:
    if len(dtypes) > 1:
        return f"its parts have different dtypes ({', '.join(sorted(dtype.name for dtype in dtypes))})"
    (disk,) = dtypes
    if disk.numpy is None:
        return f"dtype {disk.name} is known but not supported"
    wanted_is_float = any(wanted == np.dtype(DTYPES[name].numpy) for name in _FLOATS)
    if disk.numpy != wanted and not (disk.name in _FLOATS and wanted_is_float):
        return f"dtype {disk.name} on disk is never converted to {wanted}"
    return None


def _stack_dims(name: str, shape: tuple[int, ...], num_segments: int) -> int:
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
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders[box].append(device)
    return tuple(Shard(box, tuple(devices)) for box, devices in sorted(holders.items()))


def make_reads(
    parameters: Iterable[Parameter], tensors: Mapping[str, TensorInfo], *, piece_bytes: int, max_gap: int
) -> tuple[Read, ...]:
    """Divides every parameter into pieces of at most `piece_bytes` and joins small neighbours, in file order.

    `max_gap` is the number of bytes that are cheaper to read and drop than to skip.
    """
    pieces = [piece for parameter in parameters for piece in make_pieces(parameter, tensors, piece_bytes, max_gap)]
    starts = sorted(((piece.tensor.file, next(piece.offsets())), index) for index, piece in enumerate(pieces))
    reads: list[Read] = []
    for (file, begin), index in starts:
        piece = pieces[index]
        is_small = piece.nbytes <= SMALL_PIECE_BYTES and piece.run_bytes == piece.nbytes
        end = begin + piece.nbytes
        last = reads[-1] if reads else None
        if is_small and last is not None and _joins(last, file, begin, end, piece_bytes, max_gap):
            reads[-1] = Read(file, last.begin, max(end, last.end), (*last.pieces, piece))
        else:
            reads.append(Read(file, begin, end, (piece,)))
    return tuple(reads)


def _joins(last: Read, file: str, begin: int, end: int, piece_bytes: int, max_gap: int) -> bool:
    first = last.pieces[0]
    is_joinable = first.nbytes <= SMALL_PIECE_BYTES and first.run_bytes == first.nbytes
    return is_joinable and last.file == file and begin - last.end <= max_gap and end - last.begin <= piece_bytes


def make_pieces(parameter: Parameter, tensors: Mapping[str, TensorInfo], piece_bytes: int, max_gap: int) -> Iterator[Piece]:
    itemsize = parameter.disk_dtype.itemsize
    boxes = [shard.box for shard in parameter.shards if math.prod(box_shape(shard.box))]
    if any(run_length(box, parameter.shape) * itemsize < LONG_RUN_BYTES for box in boxes):
        boxes = [widen(box, parameter.shape, max_gap // itemsize) for box in merge(boxes)]
    strides = [math.prod(parameter.shape[dim + 1 :]) for dim in range(len(parameter.shape))]
    for box in boxes:
        for part in split(box, piece_bytes // itemsize, parameter.stack_dims):
            first = sum(start * stride for (start, _), stride in zip(part, strides, strict=True))
            segment = parameter.segments[first // parameter.segments[0].size]
            yield Piece(parameter, part, tensors[segment.tensor])


# --- boxes ---------------------------------------------------------------------------------------------------------------


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """The common part of two boxes, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative(box: Box, origin: Box) -> tuple[slice, ...]:
    """The box as an index into an array that holds the box `origin`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, origin, strict=True))


def _run_dim(box: Box, shape: tuple[int, ...]) -> int:
    """The outermost dimension along which the box is contiguous in an array of that shape."""
    dim = len(shape)
    while dim > 0 and (dim == len(shape) or box[dim] == (0, shape[dim])):
        dim -= 1
    return dim


def run_length(box: Box, shape: tuple[int, ...]) -> int:
    """How many consecutive elements of a row-major array of that shape the box takes at a time."""
    return math.prod(box_shape(box)[_run_dim(box, shape) :])


def merge(boxes: Iterable[Box]) -> list[Box]:
    """Joins boxes that are neighbours along one dimension until none are: eight column shards become the whole matrix."""
    merged = sorted(set(boxes))
    for dim in reversed(range(len(merged[0]) if merged else 0)):
        lines: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        for box in merged:
            lines[box[:dim] + box[dim + 1 :]].append(box[dim])
        merged = [
            line[:dim] + (interval,) + line[dim:] for line, intervals in lines.items() for interval in _join(intervals)
        ]
    return sorted(merged)


def _join(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def widen(box: Box, shape: tuple[int, ...], max_gap: int) -> Box:
    """The box extended to whole rows wherever the gap between its runs is at most `max_gap` elements."""
    for dim in reversed(range(1, len(shape))):
        gap = (shape[dim] - (box[dim][1] - box[dim][0])) * math.prod(box_shape(box)[dim + 1 :])
        if gap > max_gap:
            break
        box = (*box[:dim], (0, shape[dim]), *box[dim + 1 :])
    return box


def split(box: Box, limit: int, first_dim: int) -> Iterator[Box]:
    """Divides a box into boxes of at most `limit` elements (at least one), in row-major order.

    Dimensions before `first_dim` are always cut into single indices.
    """
    extents = box_shape(box)
    dim = first_dim
    while dim < len(box) - 1 and math.prod(extents[dim + 1 :]) > limit:
        dim += 1
    if not box:
        yield box
        return
    rows = max(1, limit // max(1, math.prod(extents[dim + 1 :])))
    for index in itertools.product(*(range(start, stop) for start, stop in box[:dim])):
        fixed = tuple((i, i + 1) for i in index)
        for start in range(box[dim][0], box[dim][1], rows):
            yield (*fixed, (start, min(start + rows, box[dim][1])), *box[dim + 1 :])
