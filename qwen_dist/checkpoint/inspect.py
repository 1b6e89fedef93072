"""What a checkpoint holds and what loading it would take, without loading it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_dist.checkpoint.format import TensorInfo
from qwen_dist.checkpoint.mapping import SCALE_SUFFIX, fold
from qwen_dist.checkpoint.source import Checkpoint, open_checkpoint
from qwen_dist.errors import UserError

if TYPE_CHECKING:
    import jax
    from rich.console import Console

# From the content of config.json: the abstract model, the shapes on disk and whether the head is tied, as `load` takes
# them.
MakeTarget = Callable[[Mapping[str, Any]], tuple[Mapping[str, "jax.ShapeDtypeStruct"], Mapping[str, tuple[int, ...]], bool]]


@dataclass(frozen=True)
class Group:
    """Tensors that differ only in layer or expert number: `name` holds the ranges, the sizes are sums."""

    name: str
    tensors: int
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LoadSummary:
    """What the plan says about loading onto a mesh."""

    text: str
    bytes_read: int
    over_read: float
    reads: int
    host_memory_bytes: int
    bytes_per_device: dict[str, int]
    skipped: tuple[str, ...]
    digest: str


@dataclass
class Report:
    """Everything `inspect` finds; a checkpoint that cannot be loaded has `problems`, and whatever could be read."""

    location: str
    architecture: str = ""
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    load: LoadSummary | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print(self, console: "Console") -> None:
        """The report as a tree a person can read."""
        from rich.markup import escape
        from rich.tree import Tree

        title = f"[bold]{escape(self.location)}[/]  {escape(self.architecture)}"
        sizes = f"{self.parameters / 1e9:.3f} B parameters, {self.bytes / 1e9:.3f} GB in {len(self.files)} files"
        dtypes = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in self.dtypes.items())
        console.print(Tree(f"{title}\n{sizes} ({dtypes})" if self.files else title))
        if self.groups:
            console.print(self._tree())
        if self.load is not None:
            console.print(f"[bold]load[/]  {escape(self.load.text)}", highlight=False, soft_wrap=True)
        for label, style, lines in (("warning", "yellow", self.warnings), ("problem", "red", self.problems)):
            for line in lines:
                console.print(f"[{style}]{label}[/]  {escape(line)}", highlight=False, soft_wrap=True)

    def _tree(self) -> Any:
        from rich.tree import Tree

        root = Tree("parameters")
        branches: dict[tuple[str, ...], Any] = {(): root}
        for group in self.groups:
            *modules, leaf = group.name.split(".")
            depth = 0
            # A module with a single tensor shares its line.
            while depth < len(modules) and len(self._below(modules[: depth + 1])) > 1:
                depth += 1
                path = tuple(modules[:depth])
                if path not in branches:
                    below = self._below(path)
                    size = _size(sum(g.parameters for g in below), sum(g.bytes for g in below))
                    branches[path] = branches[path[:-1]].add(f"{path[-1]}  [dim]{size}[/]")
            count = f"{group.tensors} x " if group.tensors > 1 else ""
            shape = r"\[" + ", ".join(map(str, group.shape)) + "]"
            label = ".".join([*modules[depth:], leaf])
            size = _size(group.parameters, group.bytes)
            branches[tuple(modules[:depth])].add(f"{label}  {count}{group.dtype} {shape}  [dim]{size}[/]")
        return root

    def _below(self, path: Sequence[str]) -> list[Group]:
        return [group for group in self.groups if group.name.split(".")[: len(path)] == list(path)]


def _size(parameters: int, nbytes: int) -> str:
    return f"{_human(parameters).strip()}, {_human(nbytes)}B"


def _human(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} G"


def inspect(location: str, make_target: MakeTarget | None = None, *, host_memory_budget: int | None = None) -> Report:
    """Describes the checkpoint at a location, as `open_checkpoint` takes it; reads headers and configuration only.

    Args:
        location: a directory, hub id or address.
        make_target: when given, the load onto its shardings is planned and summarised too.
        host_memory_budget: as in `load`.

    Returns:
        The report; whatever a user could have got wrong is among its `problems`, never raised.
    """
    report = Report(location)
    try:
        checkpoint = open_checkpoint(location)
        _describe(report, checkpoint)
        if make_target is not None:
            report.load = _summarize_load(checkpoint, make_target, host_memory_budget)
    except UserError as error:
        first, *others = str(error).split("\n  - ")
        report.problems += others or [first]
    return report


def _describe(report: Report, checkpoint: Checkpoint) -> None:
    report.architecture = ", ".join(
        map(str, checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])
    )
    report.warnings += checkpoint.warnings
    report.bytes = checkpoint.nbytes
    for tensor in checkpoint.tensors.values():
        report.dtypes[tensor.dtype.name] = report.dtypes.get(tensor.dtype.name, 0) + tensor.nbytes
        report.files[tensor.file] = report.files.get(tensor.file, 0) + tensor.nbytes
    report.groups = [
        _group(label, [checkpoint.tensors[name] for name in names]) for label, names in fold(checkpoint.tensors).items()
    ]
    report.parameters = sum(group.parameters for group in report.groups if not group.name.endswith(SCALE_SUFFIX))


def _group(label: str, tensors: list[TensorInfo]) -> Group:
    dtypes = "/".join(sorted({tensor.dtype.name for tensor in tensors}))
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return Group(label, len(tensors), dtypes, tensors[0].shape, parameters, sum(tensor.nbytes for tensor in tensors))


def _summarize_load(checkpoint: Checkpoint, make_target: MakeTarget, budget: int | None) -> LoadSummary:
    from qwen_dist.checkpoint.load import make_plan

    target, disk_shapes, tied = make_target(checkpoint.config)
    plan = make_plan(checkpoint, target, disk_shapes=disk_shapes, tied=tied, host_memory_budget=budget)
    return LoadSummary(
        text=str(plan),
        bytes_read=plan.bytes_read,
        over_read=plan.over_read,
        reads=len(plan.reads),
        host_memory_bytes=plan.host_memory,
        bytes_per_device={str(device): nbytes for device, nbytes in plan.bytes_per_device().items()},
        skipped=plan.names.skipped,
        digest=plan.digest,
    )
