"""The metrics of a run on disk: one JSON line a step, event files for TensorBoard, and a chart of the loss."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_dist.charts import Chart, legend, page, section
from qwen_dist.errors import UserError
from qwen_dist.json_reader import JsonError, parse_json


class MetricsLog:
    """The metrics of a run by step, in its directory. Only the first process writes.

    Attributes:
      entries: the lines so far; empty on other processes.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        done: int,
        tensorboard: bool,
        is_first: bool,
        log: Callable[[str], None] = lambda text: None,
    ):
        """Open the log after step `done`; entries of later steps, from before an interruption, are dropped.

        Lines that are not whole, as a power failure can leave them, are left out, and `log` says how many.

        Raises:
          UserError: the file cannot be read or written, or `tensorboard` is set and its package is not installed.
        """
        self._directory = directory
        self._file = self._tensorboard = None
        self.entries: list[dict[str, Any]] = []
        if not is_first:
            return
        self._path = directory / "metrics.jsonl"
        with self._errors():
            if self._path.exists():
                entries, num_damaged = _read_entries(self._path)
                self.entries = [entry for entry in entries if entry["step"] <= done]
                if num_damaged:
                    log(f"{self._path} has {num_damaged} damaged lines, which are left out")
            # In one step: a run that is killed here keeps the metrics of its earlier steps.
            partial = self._path.with_name("metrics.jsonl.partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
            partial.replace(self._path)
            self._file = self._path.open("a")
        if tensorboard:
            self._tensorboard = _open_tensorboard(directory / "tensorboard", done)

    def add(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Write the metrics of one step; they are in the file when this returns."""
        if self._file is None:
            return
        self.entries.append({"step": step, **metrics})
        with self._errors():
            self._file.write(json.dumps(self.entries[-1]) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files and draw the chart."""
        if self._file is None:
            return
        with self._errors():
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
            (self._directory / "loss.html").write_text(loss_chart(self.entries), encoding="utf-8")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; run the same command again to resume"
            ) from error


def _read_entries(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines, and the number of damaged ones; the last line may be incomplete, which is no damage."""
    *lines, _ = path.read_bytes().split(b"\n")
    entries, num_damaged = [], 0
    for line in lines:
        try:
            entry = parse_json(line)
        except JsonError:
            entry = None
        if isinstance(entry, dict) and "step" in entry and all(type(value) in (int, float) for value in entry.values()):
            entries.append(entry)
        else:
            num_damaged += 1
    return entries, num_damaged


def _open_tensorboard(directory: pathlib.Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=True needs an extra: pip install 'qwen-dist[tensorboard]'") from None
    return SummaryWriter(str(directory), purge_step=done + 1 if done else None)


def loss_chart(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a self-contained HTML page: the loss of every step, its running mean, and the evaluation losses."""
    train = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    points = train + evaluated
    if not points:
        return page("Loss", section("No steps yet", "", " "))
    last, top = max(step for step, _ in points), max(loss for _, loss in points)
    low = min(0.0, *(loss for _, loss in points))
    chart = Chart((0, last), (low, top), height=380)
    ticks = [round(low + (top - low) * quarter / 4, 2) for quarter in range(5)]
    dots = (chart.dot(step, loss, "#c4442d", f"evaluation {step}: {loss:.4f}", 4) for step, loss in evaluated)
    svg = chart.svg(
        chart.frame("step", ticks, [round(last * quarter / 4) for quarter in range(5)]),
        chart.line(train, "#9bb8d3", 1),
        chart.line(_smooth(train), "#1f5f99", 2),
        *dots,
    )
    note = f"first {train[0][1]:.4f}, last {train[-1][1]:.4f}; " if train else ""
    colors = {"each step": "#9bb8d3", "running mean": "#1f5f99", "evaluations": "#c4442d"}
    return page("Loss", section("Loss by step", note + legend(colors), svg))


def _smooth(values: Sequence[tuple[int, float]], keep: float = 0.95) -> list[tuple[int, float]]:
    """Return the exponential moving average, corrected for its start."""
    total = weight = 0.0
    smoothed = []
    for step, value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append((step, total / weight))
    return smoothed
