"""How a run went: what it did over time, in bounded memory, as numbers for a table and as a chart."""

from __future__ import annotations

import dataclasses
import html
import os

from qwen_dist.batch.run import Summary
from qwen_dist.engine.engine import EngineStats
from qwen_dist.errors import UserError

# With more samples than this every second one is dropped, and from then on half as many are taken.
MAX_SAMPLES = 1024
WIDTH, HEIGHT, LEFT, TOP = 860, 180, 70, 30


@dataclasses.dataclass(frozen=True)
class Sample:
    """The totals at a moment of the run, and how full the engine was."""

    seconds: float
    num_read: int
    num_written: int
    num_running: int
    num_waiting: int
    cache_use: float


class Series:
    """Samples of a run, evenly spread over it."""

    def __init__(self) -> None:
        self.samples = [Sample(0.0, 0, 0, 0, 0, 0.0)]
        self._skip, self._coming = 1, 0

    def add(self, summary: Summary, stats: EngineStats) -> None:
        """Take a sample, unless there are as many as are wanted for so long a run."""
        self._coming += 1
        if self._coming % self._skip:
            return
        cache_use = stats.held_positions / max(stats.cache_positions, 1)
        totals = summary.seconds, summary.num_prompt_tokens, summary.num_generated_tokens
        self.samples.append(Sample(*totals, stats.num_running, stats.num_waiting, cache_use))
        if len(self.samples) > MAX_SAMPLES:
            self.samples, self._skip = self.samples[::2], 2 * self._skip

    def mean(self, name: str) -> float:
        """The mean over time of what was so between one sample and the next."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        total = sum((after.seconds - before.seconds) * getattr(after, name) for before, after in pairs)
        return total / max(self.samples[-1].seconds, 1e-9)

    def speeds(self, name: str) -> list[tuple[float, float]]:
        """(seconds, how much a total grew a second) between one sample and the next."""
        pairs = [(a, b) for a, b in zip(self.samples, self.samples[1:], strict=False) if b.seconds > a.seconds]
        return [(b.seconds, (getattr(b, name) - getattr(a, name)) / (b.seconds - a.seconds)) for a, b in pairs]


def check_chart(path: str) -> None:
    """Raises UserError if a chart cannot be written there."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UserError(f"cannot write the chart {path}: its directory is not there; make it, or name another")


def write_chart(path: str, series: Series) -> None:
    """Write an HTML page with tokens a second, requests and cache use over time; it needs nothing but itself."""

    def values(name: str) -> list[tuple[float, float]]:
        return [(sample.seconds, float(getattr(sample, name))) for sample in series.samples[1:]]

    percent = [(seconds, 100 * use) for seconds, use in values("cache_use")]
    panels = [
        (
            "tokens a second",
            {"written": series.speeds("num_written"), "read, at their answer's end": series.speeds("num_read")},
        ),
        ("requests", {"running": values("num_running"), "waiting": values("num_waiting")}),
        ("cache held, %", {"of what there is": percent}),
    ]
    body = "\n".join(_panel(title, lines) for title, lines in panels)
    head = '<!doctype html><meta charset="utf-8"><title>qwen-dist batch</title>'
    page = f'{head}\n<body style="font: 13px sans-serif">\n{body}\n'
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"cannot write the chart {path}: {error.strerror}") from error


def _panel(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    points = [point for line in lines.values() for point in line]
    end, top = max((x for x, _ in points), default=0) or 1, max((y for _, y in points), default=0) or 1
    parts = [f'<svg width="{LEFT + WIDTH + 20}" height="{TOP + HEIGHT + 25}"><g transform="translate({LEFT},{TOP})">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>')
    parts.append(f'<text y="-8" font-weight="bold">{html.escape(title)}</text>')
    parts.append(
        f'<text x="-6" y="10" text-anchor="end">{top:.4g}</text><text x="-6" y="{HEIGHT}" text-anchor="end">0</text>'
    )
    parts.append(f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{end:.4g} s</text>')
    for index, ((name, line), colour) in enumerate(zip(lines.items(), ("#1f6fb4", "#d9730d"), strict=False)):
        drawn = " ".join(f"{x / end * WIDTH:.1f},{HEIGHT - y / top * HEIGHT:.1f}" for x, y in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{200 + 220 * index}" y="-8" fill="{colour}">{html.escape(name)}</text>')
    return "".join(parts) + "</g></svg>"
