"""Which bytes of the checkpoint make up each parameter: names, and the two verbs *view* and *stack*.

A parameter, flattened in row-major order, is a sequence of equally long segments, each a contiguous part of one tensor on
disk. One segment is a **view**: the tensor's own bytes under another shape (`q_proj.weight` [N*H, D] seen as [N, H, D]).
Many are a **stack**: the experts' tensors [F, D], one after the other, are [E, F, D]. Nothing is ever transposed.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qwen_dist.checkpoint.format import TensorInfo
from qwen_dist.errors import CheckpointError

# (prefix of the text model, prefix of lm_head) as the releases write them: text models, multimodal ones, the older
# multimodal order, and a bare text model.
PREFIXES = (("model.", ""), ("model.language_model.", ""), ("language_model.model.", "language_model."), ("", ""))
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
SCALE_SUFFIX = "_scale_inv"
# Parts of a release that are not the text model (vision tower, multi-token prediction), and a buffer that old files carry.
_SKIPPED = re.compile(r"(model\.)?visual\.|mtp\.|.*\.rotary_emb\.inv_freq$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERTS = re.compile(r"(.*\.experts\.)(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?$")


@dataclass(frozen=True)
class Segment:
    """`size` elements of one tensor, from element `start` on; `shape` is what the tensor must have on disk."""

    tensor: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class NameMap:
    """Where every parameter comes from, and where it goes back to.

    Attributes:
        segments: the segments of each parameter, in row-major order.
        scales: the block scales of quantised weights, by the weight's name on disk.
        skipped: tensors of the checkpoint that are knowingly not loaded.
        tied_head: a stored `lm_head.weight` of a model without one, and the embedding that it must equal.
    """

    segments: Mapping[str, tuple[Segment, ...]]
    scales: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    tied_head: tuple[str, str] | None = None


def name_tensors(
    disk_shapes: Mapping[str, tuple[int, ...]], *, prefix: tuple[str, str] = PREFIXES[0], fused_experts: bool = False
) -> NameMap:
    """The names a model's tensors have on disk, by convention alone.

    Args:
        disk_shapes: for each parameter of the model the shape its tensor has on disk (experts: with the leading E).
        prefix: one of `PREFIXES`.
        fused_experts: experts lie in one tensor per kind rather than in one per expert.
    """
    return NameMap(
        {
            name: _segments(prefix[name == HEAD] + name, shape, fused_experts=fused_experts)
            for name, shape in disk_shapes.items()
        }
    )


def map_names(
    disk_shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], *, tied: bool = False
) -> NameMap:
    """Finds the tensors of every parameter in a checkpoint.

    Args:
        disk_shapes: as in `name_tensors`.
        tensors: the tensors of the checkpoint.
        tied: the model's head is its embedding; a stored `lm_head.weight` is set aside.

    Raises:
        CheckpointError: missing tensors, unexpected tensors, tensors of another shape: all of them in one message.
    """
    prefix, fused_experts = find_layout(disk_shapes, tensors)
    segments = name_tensors(disk_shapes, prefix=prefix, fused_experts=fused_experts).segments
    used = {segment.tensor: segment.shape for parts in segments.values() for segment in parts}
    scales = {name: name + SCALE_SUFFIX for name in used if name + SCALE_SUFFIX in tensors}
    skipped = {name for name in tensors if _SKIPPED.match(name)}
    head, embedding = prefix[1] + HEAD, prefix[0] + EMBEDDING
    tied_head = (head, embedding) if tied and HEAD not in disk_shapes and {head, embedding} <= set(tensors) else None
    known = {*used, *scales.values(), *skipped, *(tied_head or ())}
    problems = [f"missing: {line}" for line in summarize(name for name in used if name not in tensors)]
    problems += [f"unexpected: {line}" for line in summarize(name for name in tensors if name not in known)]
    problems += [
        f"wrong shape: {name}: the model expects {list(shape)}, the checkpoint has {list(tensors[name].shape)}"
        for name, shape in used.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError(
            "The checkpoint does not fit the model (names and shapes must be as config.json implies):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    return NameMap(segments, scales, tuple(sorted(skipped)), tied_head)


def find_layout(parameters: Iterable[str], tensors: Iterable[str]) -> tuple[tuple[str, str], bool]:
    """The prefix under which most of the parameters are found in a checkpoint, and whether its experts are fused."""
    stored, wanted = set(tensors), list(parameters)
    prefix = max(PREFIXES, key=lambda prefix: sum((prefix[name == HEAD] + name) in stored for name in wanted))
    return prefix, any(name.endswith((".experts.gate_up_proj", ".experts.down_proj")) for name in stored)


def _segments(name: str, shape: tuple[int, ...], *, fused_experts: bool) -> tuple[Segment, ...]:
    experts = _EXPERTS.match(name)
    if experts is None:
        return (Segment(name, shape, 0, math.prod(shape)),)
    start, kind = experts.groups()
    num_experts, rows, columns = shape
    if fused_experts:
        return tuple(_fused_experts(start, kind, num_experts, rows, columns))
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    part_shape = (rows // len(parts), columns)
    return tuple(
        Segment(f"{start}{expert}.{part}.weight", part_shape, 0, math.prod(part_shape))
        for expert in range(num_experts)
        for part in parts
    )


def _fused_experts(start: str, kind: str, num_experts: int, rows: int, columns: int) -> Iterator[Segment]:
    """One segment per expert: all of its rows, or the gate's or the up projection's half of `gate_up_proj` [E, 2F, D]."""
    is_half = kind in ("gate_proj", "up_proj")
    tensor = start + ("gate_up_proj" if is_half else kind)
    shape = (num_experts, 2 * rows if is_half else rows, columns)
    offset = rows * columns if kind == "up_proj" else 0
    for expert in range(num_experts):
        yield Segment(tensor, shape, expert * math.prod(shape[1:]) + offset, rows * columns)


def summarize(names: Iterable[str]) -> list[str]:
    """Names that differ only in layer or expert numbers, in one line: `layers.{0-23}.mlp.up_proj.weight (24 tensors)`."""
    return [label if len(group) == 1 else f"{label} ({len(group)} tensors)" for label, group in fold(names).items()]


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names that differ only in numbers; each group is labelled with the ranges of its numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("{}", name)].append(name)
    folded = {}
    for template, group in groups.items():
        label = template
        for column in zip(*(_NUMBER.findall(name) for name in group), strict=True):
            label = label.replace("{}", _ranges(map(int, column)), 1)
        folded[label] = group
    return folded


def _ranges(numbers: Iterable[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
    return text if text.isdigit() else "{" + text + "}"
