"""Which tensors of a checkpoint make up each parameter.

A parameter, flattened in row-major order, is a sequence of segments of equal length; each is a contiguous part of one
tensor on disk. One segment is a **view**: the same bytes in another shape (`q_proj.weight` [N*H, D] as [N, H, D]). Several
are a **stack**: the experts' tensors [F, D], one after the other, are [E, F, D]; or **sections**: a tensor with the rows of
all heads' queries, then keys, then values, is read head by head. Nothing is transposed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.errors import CheckpointError, problem_list

# (prefix of the text model, prefix of lm_head) in published checkpoints: text models, multimodal models, the older
# multimodal order, and a text model without a head.
PREFIXES = (("model.", ""), ("model.language_model.", ""), ("language_model.model.", "language_model."), ("", ""))
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
SCALE_SUFFIX = "_scale_inv"
# Tensors outside the text model (vision tower, multi-token prediction), and a buffer that old checkpoints contain.
_SKIPPED = re.compile(r"(model\.)?visual\.|mtp\.|.*\.rotary_emb\.inv_freq$")
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_EXPERTS = re.compile(r"(.*\.experts\.)(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(\w+))?$")


@dataclass(frozen=True)
class Segment:
    """`size` elements of one tensor, from element `start`. `shape` is the shape that the tensor must have on disk."""

    tensor: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its tensors.

    Attributes:
      prefix: one of `PREFIXES`.
      fused_experts: the groups of experts, such as `layers.0.mlp.experts.`, that have one tensor for all experts of a
        projection. Others have one for each expert.
    """

    prefix: tuple[str, str] = PREFIXES[0]
    fused_experts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class NameMap:
    """Which tensors every parameter is loaded from and saved to.

    Attributes:
      segments: the segments of each parameter, in row-major order.
      scales: the block scales of quantised weights, by the weight's name on disk.
      skipped: tensors of the checkpoint that are not loaded on purpose.
      tied_head: a stored `lm_head.weight` of a model with a tied head, and the embedding that it must equal.
    """

    segments: Mapping[str, tuple[Segment, ...]]
    scales: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    tied_head: tuple[str, str] | None = None


def name_tensors(disk_shapes: Mapping[str, tuple[int, ...]], *, layout: Layout | None = None) -> NameMap:
    """Return the names of a model's tensors on disk by convention, without looking at a checkpoint.

    Args:
      disk_shapes: by parameter name, the shape on disk (for experts: with the leading E).
      layout: of the checkpoint; by default that of a text model with one tensor for each expert.
    """
    layout = layout or Layout()
    return NameMap({name: _segments(name, shape, layout) for name, shape in disk_shapes.items()})


def name_alone(shapes: Mapping[str, tuple[int, ...]], stored: Container[str] = ()) -> NameMap:
    """Return the names of tensors that are in memory as they are on disk, each with its scales if these are stored."""
    segments = {name: (Segment(name, shape, 0, math.prod(shape)),) for name, shape in shapes.items()}
    return NameMap(segments, {name: name + SCALE_SUFFIX for name in segments if name + SCALE_SUFFIX in stored})


def map_names(
    disk_shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
    *,
    tied: bool = False,
    unread: Collection[str] = (),
) -> NameMap:
    """Find the tensors of every parameter in a checkpoint.

    Args:
      disk_shapes: as in `name_tensors`.
      tensors: the tensors of the checkpoint.
      tied: the model's head is its embedding; a stored `lm_head.weight` is recorded as `tied_head`.
      unread: tensors that may be there and are not needed, such as the shapes of packed weights.

    Raises:
      CheckpointError: tensors are missing, unexpected, or of another shape; one message lists them all.
    """
    layout = find_layout(disk_shapes, tensors)
    prefix, segments = layout.prefix, name_tensors(disk_shapes, layout=layout).segments
    used = {segment.tensor: segment.shape for of_parameter in segments.values() for segment in of_parameter}
    scales = {name: name + SCALE_SUFFIX for name in used if name + SCALE_SUFFIX in tensors}
    skipped = {name for name in tensors if _SKIPPED.match(name)}
    head, embedding = prefix[1] + HEAD, prefix[0] + EMBEDDING
    tied_head = (head, embedding) if tied and HEAD not in disk_shapes and {head, embedding} <= set(tensors) else None
    known = {*used, *scales.values(), *skipped, *unread, *(tied_head or ())}
    problems = [f"missing: {line}" for line in summarize_names(name for name in used if name not in tensors)]
    problems += [f"unexpected: {line}" for line in summarize_names(name for name in tensors if name not in known)]
    problems += [
        f"wrong shape: {name}: the model expects {list(shape)}, the checkpoint has {list(tensors[name].shape)}"
        for name, shape in used.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError(
            "The checkpoint does not fit the model (config.json determines names and shapes):\n" + problem_list(problems)
        )
    return NameMap(segments, scales, tuple(sorted(skipped)), tied_head)


def find_layout(parameters: Iterable[str], tensors: Iterable[str]) -> Layout:
    """Return the prefix with which most parameters are found in a checkpoint, and which groups of experts are fused."""
    stored, parameter_names = set(tensors), list(parameters)
    prefix = max(PREFIXES, key=lambda prefix: sum((prefix[name == HEAD] + name) in stored for name in parameter_names))
    groups = {match[1] for match in map(_EXPERTS.match, parameter_names) if match}
    fused = {group for group in groups if {f"{prefix[0]}{group}{one}" for one in ("gate_up_proj", "down_proj")} & stored}
    return Layout(prefix, frozenset(fused))


def _segments(parameter_name: str, shape: tuple[int, ...], layout: Layout) -> tuple[Segment, ...]:
    name = layout.prefix[parameter_name.startswith("lm_head.")] + parameter_name
    experts = _EXPERTS.match(name)
    if experts is None:
        sections = getattr(shape, "sections", ())
        return tuple(_section_segments(name, shape, sections)) if sections else (Segment(name, shape, 0, math.prod(shape)),)
    prefix, parameter, leaf = experts.groups()
    num_experts, rows, columns = shape
    if leaf in (None, "weight") and prefix.removeprefix(layout.prefix[0]) in layout.fused_experts:
        return tuple(_fused_expert_segments(prefix, parameter, num_experts, rows, columns))
    projections = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    disk_shape = (rows // len(projections), columns)
    return tuple(
        Segment(f"{prefix}{expert}.{projection}.{leaf or 'weight'}", disk_shape, 0, math.prod(disk_shape))
        for expert in range(num_experts)
        for projection in projections
    )


def _section_segments(name: str, shape: tuple[int, ...], sections: tuple[int, ...]) -> Iterator[Segment]:
    """Yield a parameter's rows head by head, from a tensor with all heads' rows of each section together."""
    num_heads, row = shape[0] // sum(sections), math.prod(shape[1:])
    size = math.gcd(*sections)
    for head in range(num_heads):
        section_start = 0
        for rows in sections:
            for start in range(section_start + head * rows, section_start + (head + 1) * rows, size):
                yield Segment(name, shape, start * row, size * row)
            section_start += num_heads * rows


def _fused_expert_segments(prefix: str, parameter: str, num_experts: int, rows: int, columns: int) -> Iterator[Segment]:
    """Yield one segment per expert: all of its rows, or for gate_proj and up_proj half of `gate_up_proj` [E, 2F, D]."""
    is_half = parameter in ("gate_proj", "up_proj")
    tensor = prefix + ("gate_up_proj" if is_half else parameter)
    shape = (num_experts, 2 * rows if is_half else rows, columns)
    offset = rows * columns if parameter == "up_proj" else 0
    for expert in range(num_experts):
        yield Segment(tensor, shape, expert * math.prod(shape[1:]) + offset, rows * columns)


def carried_names(tensors: Iterable[str]) -> list[str]:
    """Return the tensors outside the text model that a saved checkpoint should also have, such as a vision tower."""
    return sorted(name for name in tensors if _SKIPPED.match(name) and not name.endswith((SCALE_SUFFIX, ".inv_freq")))


def summarize_names(names: Iterable[str]) -> list[str]:
    """Return one line per group of names that differ only in numbers: `layers.{0-23}.mlp.up_proj.weight (24 tensors)`."""
    return [label if len(group) == 1 else f"{label} ({len(group)} tensors)" for label, group in group_names(names).items()]


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in numbers, by a label with the ranges of the numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("{}", name)].append(name)
    labelled = {}
    for template, group in groups.items():
        label = template
        for column in zip(*(_NUMBER.findall(name) for name in group), strict=True):
            label = label.replace("{}", _format_ranges(map(int, column)), 1)
        labelled[label] = group
    return labelled


def _format_ranges(numbers: Iterable[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return text if text.isdigit() else "{" + text + "}"
