"""What a run leaves to read: numbers of every step as JSON lines and for TensorBoard, and a chart of the loss."""

from __future__ import annotations

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_dist.errors import UserError


class Journal:
    """The numbers of a run, by step, in its directory; on processes other than the first nothing is written."""

    def __init__(self, directory: pathlib.Path, *, done: int, tensorboard: bool, is_first: bool):
        """Go on behind step `done`; what was written of later steps, before the run was cut off, is left out.

        Raises UserError when TensorBoard's files are asked for and the package is not there.
        """
        self._directory = directory
        self._file = self._board = None
        self.entries: list[dict[str, Any]] = []
        if not is_first:
            return
        path = directory / "metrics.jsonl"
        if path.exists():
            self.entries = [entry for entry in _read_entries(path) if entry["step"] <= done]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._file = path.open("a")
        if tensorboard:
            self._board = _open_board(directory / "tensorboard", done)

    def add(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Numbers of one step; complete on disk when this returns."""
        if self._file is None:
            return
        self.entries.append({"step": step, **numbers})
        self._file.write(json.dumps(self.entries[-1]) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Also draws the chart."""
        if self._file is None:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        (self._directory / "loss.html").write_text(chart(self.entries), encoding="utf-8")


def _read_entries(path: pathlib.Path) -> list[dict[str, Any]]:
    """The last line may be cut off."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _open_board(directory: pathlib.Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=True needs an extra: pip install 'qwen-dist[tensorboard]'") from None
    return SummaryWriter(str(directory), purge_step=done + 1 if done else None)


WIDTH, HEIGHT, MARGIN = 900, 380, 50


def chart(entries: Sequence[Mapping[str, Any]]) -> str:
    """A page with the loss of every step, its running mean, and the losses of evaluations; it needs nothing else."""
    train = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    points = train + evaluated
    if not points:
        return _PAGE.format(lines="", ticks="", note="no step has been done")
    last, top = max(step for step, _ in points), max(loss for _, loss in points)
    low = min(0.0, *(loss for _, loss in points))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / max(last, 1)
        return round(x, 1), round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - low) / max(top - low, 1e-9), 1)

    def line(values: Sequence[tuple[int, float]], style: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in (place(*value) for value in values))
        return f'<polyline points="{path}" fill="none" {style}/>'

    lines = line(train, 'stroke="#9bb8d3" stroke-width="1"') + line(_smooth(train), 'stroke="#1f5f99" stroke-width="2"')
    for step, loss in evaluated:
        x, y = place(step, loss)
        lines += f'<circle cx="{x}" cy="{y}" r="4" fill="#c4442d"><title>evaluation {step}: {loss:.4f}</title></circle>'
    ticks = ""
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(last * fraction, low + (top - low) * fraction)
        ticks += f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end">{low + (top - low) * fraction:.2f}</text>'
        ticks += f'<text x="{x}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle">{last * fraction:.0f}</text>'
    note = f"loss by step: {train[0][1]:.4f} at first, {train[-1][1]:.4f} at last" if train else "loss by step"
    return _PAGE.format(lines=lines, ticks=ticks, note=html.escape(note))


def _smooth(values: Sequence[tuple[int, float]], keep: float = 0.95) -> list[tuple[int, float]]:
    """A running mean in which a value counts less the longer ago it was."""
    total = weight = 0.0
    smoothed = []
    for step, value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


_PAGE = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Loss</title>
<style>
body {{{{ font: 14px system-ui, sans-serif; margin: 2rem; background: #fff }}}} text {{{{ fill: #555; font-size: 12px }}}}
</style>
<p>{{note}} (light: each step; dark: running mean; red: evaluations)</p>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">
<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}" fill="none" stroke="#ccc"/>
{{ticks}}{{lines}}</svg></html>
"""
