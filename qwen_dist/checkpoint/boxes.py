"""Arithmetic on boxes. A box is a rectangular part of an array: one (start, stop) per dimension, stop exclusive."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

Box = tuple[tuple[int, int], ...]


def box_from_slices(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Return the box that a tuple of slices selects from an array of that shape."""
    return tuple(item.indices(size)[:2] for item, size in zip(index, shape, strict=True))


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def first_flat_index(box: Box, shape: tuple[int, ...]) -> int:
    """Return the row-major index of the box's first element in an array of that shape."""
    index = 0
    for (start, _), size in zip(box, shape, strict=True):
        index = index * size + start
    return index


def flat_indices(box: Box, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    """Return the box's row-major indices over only the dimensions [first, last)."""
    indices = np.zeros(1, np.int64)
    for (start, stop), size in zip(box[first:last], shape[first:last], strict=True):
        indices = (indices[:, None] * size + np.arange(start, stop)).reshape(-1)
    return indices


def intersect(one: Box, other: Box) -> Box | None:
    """Return the intersection of two boxes, or None if it is empty."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def contains(outer: Box, inner: Box) -> bool:
    """Return whether the first box contains all of the second."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def relative_slices(box: Box, origin: Box) -> tuple[Any, ...]:
    """Return the index of `box` in an array that holds the box `origin`; it always gives a view, even of a scalar."""
    return (*(slice(a - c, b - c) for (a, b), (c, _) in zip(box, origin, strict=True)), ...)


def run_dim(box: Box, shape: tuple[int, ...]) -> int:
    """Return the outermost dimension along which the box is contiguous in a row-major array of that shape."""
    dim = len(shape)
    while dim > 0 and (dim == len(shape) or box[dim] == (0, shape[dim])):
        dim -= 1
    return dim


def run_length(box: Box, shape: tuple[int, ...]) -> int:
    """Return the length, in elements, of the contiguous runs of the box in a row-major array of that shape."""
    return math.prod(box_shape(box)[run_dim(box, shape) :])


def merge_boxes(boxes: Iterable[Box]) -> list[Box]:
    """Merge boxes that are adjacent along one dimension until none are: eight column shards become the whole matrix."""
    merged = sorted(set(boxes))
    for dim in reversed(range(len(merged[0]) if merged else 0)):
        lines: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        for box in merged:
            lines[box[:dim] + box[dim + 1 :]].append(box[dim])
        merged = [
            (*line[:dim], interval, *line[dim:])
            for line, intervals in lines.items()
            for interval in _merge_intervals(intervals)
        ]
    return sorted(merged)


def _merge_intervals(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def widen_box(box: Box, shape: tuple[int, ...], max_gap: int) -> Box:
    """Return the box, extended to whole rows wherever the gap between its runs is at most `max_gap` elements."""
    for dim in reversed(range(1, len(shape))):
        gap = (shape[dim] - (box[dim][1] - box[dim][0])) * math.prod(box_shape(box)[dim + 1 :])
        if gap > max_gap:
            break
        box = (*box[:dim], (0, shape[dim]), *box[dim + 1 :])
    return box


def split_box(box: Box, limit: int, first_dim: int, whole: Collection[int] = ()) -> Iterator[Box]:
    """Yield boxes of at most `limit` elements (at least one) that together make up a box, in row-major order.

    Dimensions before `first_dim` are always split into single indices, those in `whole` never, even beyond the limit.
    """
    dims, extents = range(first_dim, len(box)), box_shape(box)
    if not (free := [dim for dim in dims if dim not in whole]):
        yield box
        return
    sizes = {dim: math.prod(extents[other] for other in dims if other > dim or other in whole) for dim in free}
    dim = next((dim for dim in free if sizes[dim] <= limit), free[-1])
    rows = max(1, limit // max(1, sizes[dim]))
    single = [other for other in range(dim) if other < first_dim or other in free]
    for index in itertools.product(*(range(*box[other]) for other in single)):
        fixed = {other: (i, i + 1) for other, i in zip(single, index, strict=True)}
        for start in range(box[dim][0], box[dim][1], rows):
            fixed[dim] = (start, min(start + rows, box[dim][1]))
            yield tuple(fixed.get(other, whole_range) for other, whole_range in enumerate(box))
