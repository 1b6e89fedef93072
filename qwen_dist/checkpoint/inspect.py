"""What a checkpoint contains and what loading it would need, without loading it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_dist.checkpoint.names import group_names
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.checkpoint.source import Checkpoint, open_checkpoint
from qwen_dist.errors import CheckpointError, UserError, printable
from qwen_dist.quantization.stored import StoredQuantization, count_values, read_stored
from qwen_dist.storage.model_files import ModelName

# What is printed of an unusual checkpoint; Qwen's have fewer than 50 groups and 6 levels.
_MAX_PRINTED_GROUPS = 500
_MAX_DEPTH = 12

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_dist.checkpoint.model import AbstractModel

# From a checkpoint to the arguments of `load`.
MakeTarget = Callable[[Checkpoint], "AbstractModel"]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in layer or expert number. `name` has the ranges of numbers; the sizes are sums."""

    name: str
    tensors: int
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LoadSummary:
    """A summary of the plan for loading onto a mesh."""

    text: str
    bytes_read: int
    over_read: float
    reads: int
    host_memory_bytes: int
    bytes_per_device: dict[str, int]
    skipped: tuple[str, ...]
    digest: str


@dataclass
class CheckpointReport:
    """The result of `inspect`. If the checkpoint cannot be loaded: its `problems`, and everything that could be read."""

    location: str
    architecture: str = ""
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    groups: list[TensorGroup] = field(default_factory=list)
    load: LoadSummary | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print(self, console: Console) -> None:
        """Print the problems and warnings, then the report as a tree."""
        from rich.markup import escape
        from rich.tree import Tree

        for label, style, lines in (("problem", "bold red", self.problems), ("warning", "yellow", self.warnings)):
            for line in lines:
                console.print(f"[{style}]{label}[/]  {escape(printable(line, 1000))}", highlight=False, soft_wrap=True)
        title = f"[bold]{escape(printable(self.location))}[/]  {escape(self.architecture)}"
        sizes = f"{self.parameters / 1e9:.3f} B parameters, {self.bytes / 1e9:.3f} GB in {len(self.files)} files"
        dtypes = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in self.dtypes.items())
        console.print(Tree(f"{title}\n{sizes} ({dtypes})" if self.files else title))
        if self.groups:
            console.print(self._tree(self.groups[:_MAX_PRINTED_GROUPS]))
        if len(self.groups) > _MAX_PRINTED_GROUPS:
            console.print(f"and {len(self.groups) - _MAX_PRINTED_GROUPS} more; --json lists all")
        if self.load is not None:
            console.print(f"[bold]load[/]  {escape(self.load.text)}", highlight=False, soft_wrap=True)

    def _tree(self, shown: Sequence[TensorGroup]) -> Any:
        from rich.markup import escape
        from rich.tree import Tree

        root = Tree("parameters")
        branches: dict[tuple[str, ...], Any] = {(): root}
        for group in shown:
            *modules, leaf = group.name.split(".")
            depth = 0
            # A module with a single tensor is on one line with it.
            while depth < min(len(modules), _MAX_DEPTH) and len(self._groups_under(modules[: depth + 1])) > 1:
                depth += 1
                path = tuple(modules[:depth])
                if path not in branches:
                    groups = self._groups_under(path)
                    size = _format_size(sum(g.parameters for g in groups), sum(g.bytes for g in groups))
                    branches[path] = branches[path[:-1]].add(f"{escape(printable(path[-1], 100))}  [dim]{size}[/]")
            count = f"{group.tensors} x " if group.tensors > 1 else ""
            shape = r"\[" + ", ".join(map(str, group.shape)) + "]"
            label = escape(printable(".".join([*modules[depth:], leaf]), 200))
            size = _format_size(group.parameters, group.bytes)
            branches[tuple(modules[:depth])].add(f"{label}  {count}{group.dtype} {shape}  [dim]{size}[/]")
        return root

    def _groups_under(self, path: Sequence[str]) -> list[TensorGroup]:
        return [group for group in self.groups if group.name.split(".")[: len(path)] == list(path)]


def _format_size(parameters: int, nbytes: int) -> str:
    return f"{_format_number(parameters).strip()}, {_format_number(nbytes)}B"


def _format_number(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} G"


def inspect(
    model: ModelName, make_target: MakeTarget | None = None, *, host_memory_budget: int | None = None
) -> CheckpointReport:
    """Describe a checkpoint; read only its headers and configuration.

    Args:
      model: as `ModelFiles.open` takes it.
      make_target: if given, the load onto its shardings is planned and summarised too.
      host_memory_budget: as in `load`.

    Returns:
      The report. Errors that a user can cause are listed in its `problems` and never raised.
    """
    report = CheckpointReport(str(model))
    try:
        checkpoint = open_checkpoint(model)
        _describe(report, checkpoint)
        if make_target is not None:
            report.load = _summarize_load(checkpoint, make_target, host_memory_budget)
    except UserError as error:
        first, *others = str(error).split("\n  - ")
        report.problems += others or [first]
    return report


def _describe(report: CheckpointReport, checkpoint: Checkpoint) -> None:
    architectures = checkpoint.config.get("architectures") or checkpoint.config.get("model_type")
    report.architecture = printable(
        ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures), 200
    )
    report.warnings += checkpoint.warnings
    report.bytes = checkpoint.nbytes
    for tensor in checkpoint.tensors.values():
        report.dtypes[tensor.dtype.name] = report.dtypes.get(tensor.dtype.name, 0) + tensor.nbytes
        report.files[tensor.file] = report.files.get(tensor.file, 0) + tensor.nbytes
    stored = None
    with contextlib.suppress(CheckpointError):  # which is a problem of loading
        stored = read_stored(checkpoint.config)
    report.groups = [
        _make_group(label, [checkpoint.tensors[name] for name in names], stored)
        for label, names in group_names(checkpoint.tensors).items()
    ]
    report.parameters = sum(group.parameters for group in report.groups)


def _make_group(label: str, tensors: list[TensorInfo], stored: StoredQuantization | None) -> TensorGroup:
    dtypes = "/".join(sorted({tensor.dtype.name for tensor in tensors}))
    parameters = sum(count_values(stored, tensor.name, math.prod(tensor.shape)) for tensor in tensors)
    return TensorGroup(label, len(tensors), dtypes, tensors[0].shape, parameters, sum(tensor.nbytes for tensor in tensors))


def _summarize_load(checkpoint: Checkpoint, make_target: MakeTarget, budget: int | None) -> LoadSummary:
    from qwen_dist.checkpoint.load import make_load_plan

    model = make_target(checkpoint)
    plan = make_load_plan(
        checkpoint,
        model.target,
        disk_shapes=model.disk_shapes,
        tied=model.is_tied,
        packed=model.packed,
        host_memory_budget=budget,
    )
    return LoadSummary(
        text=str(plan),
        bytes_read=plan.bytes_read,
        over_read=plan.over_read,
        reads=len(plan.requests),
        host_memory_bytes=plan.host_memory_bytes,
        bytes_per_device={str(device): nbytes for device, nbytes in plan.bytes_per_device().items()},
        skipped=plan.names.skipped,
        digest=plan.digest,
    )
