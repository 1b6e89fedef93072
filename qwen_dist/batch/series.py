"""Throughput, requests and cache use of a run over time, in bounded memory, for a table and a chart."""

from __future__ import annotations

import dataclasses
import itertools

from qwen_dist.batch.run import BatchSummary
from qwen_dist.charts import COLORS, Chart, axis_end, legend, page, section, write_page
from qwen_dist.engine.engine import EngineStats

# At this number every second sample is dropped and the sampling rate is halved.
MAX_SAMPLES = 1024
# Rates are averages over at least this time.
MIN_WINDOW_S = 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Token totals and the engine's load at one moment of a run."""

    seconds: float
    num_prompt_tokens: int
    num_generated_tokens: int
    num_running: int
    num_waiting: int
    cache_utilization: float


class TimeSeries:
    """Evenly spaced samples of a run."""

    def __init__(self) -> None:
        self.samples = [Sample(0.0, 0, 0, 0, 0, 0.0)]
        self._stride, self._num_calls = 1, 0

    def add(self, summary: BatchSummary, stats: EngineStats) -> None:
        """Add a sample; in a long run only every n-th call does."""
        self._num_calls += 1
        if self._num_calls % self._stride:
            return
        cache_utilization = stats.held_positions / max(stats.cache_positions, 1)
        totals = summary.seconds, summary.num_prompt_tokens, summary.num_generated_tokens
        self.samples.append(Sample(*totals, stats.num_running, stats.num_waiting, cache_utilization))
        if len(self.samples) > MAX_SAMPLES:
            self.samples, self._stride = self.samples[::2], 2 * self._stride

    def mean(self, name: str) -> float:
        """Return the mean over time of a sample's field."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        total = sum((after.seconds - before.seconds) * getattr(after, name) for before, after in pairs)
        return total / max(self.samples[-1].seconds, 1e-9)

    def rates(self, name: str) -> list[tuple[float, float]]:
        """Return (seconds, growth per second of a total) over windows of at least `MIN_WINDOW_S`.

        What comes in one step, after a step of tokens, would be a peak that means nothing. The last window is longer.
        """
        ends = [self.samples[0]]
        for sample in self.samples[1:]:
            if sample.seconds - ends[-1].seconds >= MIN_WINDOW_S:
                ends.append(sample)
        last = self.samples[-1]
        if last is not ends[-1] and last.seconds > ends[-1].seconds:
            ends[max(len(ends) - 1, 1) :] = [last]
        return [
            (b.seconds, (getattr(b, name) - getattr(a, name)) / (b.seconds - a.seconds))
            for a, b in itertools.pairwise(ends)
        ]


def write_chart(path: str, series: TimeSeries) -> None:
    """Write a self-contained HTML page with tokens per second, requests and cache use over time. Raises UserError."""

    def values(name: str) -> list[tuple[float, float]]:
        return [(sample.seconds, float(getattr(sample, name))) for sample in series.samples[1:]]

    percent = [(seconds, 100 * used) for seconds, used in values("cache_utilization")]
    rates = {
        "generated": series.rates("num_generated_tokens"),
        "prompt, at the answer's end": series.rates("num_prompt_tokens"),
    }
    requests = {"running": values("num_running"), "waiting": values("num_waiting")}
    panels = [("tokens per second", rates), ("requests", requests), ("cache in use, %", {"of the cache": percent})]
    write_page(path, page("qwen-dist batch", *(_panel(title, lines) for title, lines in panels)))


def _panel(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    points = [point for line in lines.values() for point in line]
    end, top = max((x for x, _ in points), default=0) or 1, axis_end(max((y for _, y in points), default=0))
    chart, colors = Chart((0, end), (0, top), height=220), dict(zip(lines, COLORS, strict=False))
    drawn = [chart.line(line, colors[name]) for name, line in lines.items()]
    return section(title, legend(colors), chart.svg(chart.frame("seconds", (0, top), (0, end)), *drawn))
