"""Arithmetic on boxes: one (start, stop) per dimension of an array, the stop exclusive."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Box = tuple[tuple[int, int], ...]


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box that an index of slices takes of an array of that shape."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def first_index(box: Box, shape: tuple[int, ...]) -> int:
    """The row-major index of the box's first element in an array of that shape."""
    index = 0
    for (start, _), size in zip(box, shape, strict=True):
        index = index * size + start
    return index


def flat_indices(box: Box, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    """The box's row-major indices over the dimensions [first, last) alone."""
    indices = np.zeros(1, np.int64)
    for (start, stop), size in zip(box[first:last], shape[first:last], strict=True):
        indices = (indices[:, None] * size + np.arange(start, stop)).reshape(-1)
    return indices


def intersect(one: Box, other: Box) -> Box | None:
    """The common part of two boxes, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def contains(one: Box, other: Box) -> bool:
    """Whether the first box contains all of the second."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(one, other, strict=True))


def relative(box: Box, origin: Box) -> tuple[Any, ...]:
    """The box as an index into an array that holds the box `origin`; always a view, also of a scalar."""
    return (*(slice(a - c, b - c) for (a, b), (c, _) in zip(box, origin, strict=True)), ...)


def run_dim(box: Box, shape: tuple[int, ...]) -> int:
    """The outermost dimension along which the box is contiguous in an array of that shape."""
    dim = len(shape)
    while dim > 0 and (dim == len(shape) or box[dim] == (0, shape[dim])):
        dim -= 1
    return dim


def run_length(box: Box, shape: tuple[int, ...]) -> int:
    """How many consecutive elements of a row-major array of that shape the box takes at a time."""
    return math.prod(box_shape(box)[run_dim(box, shape) :])


def merge(boxes: Iterable[Box]) -> list[Box]:
    """Joins boxes that are neighbours along one dimension until none are: eight column shards become the whole matrix."""
    merged = sorted(set(boxes))
    for dim in reversed(range(len(merged[0]) if merged else 0)):
        lines: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        for box in merged:
            lines[box[:dim] + box[dim + 1 :]].append(box[dim])
        merged = [
            (*line[:dim], interval, *line[dim:]) for line, intervals in lines.items() for interval in _join(intervals)
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
