"""What a batch shows in the terminal: a progress bar with the time that is left, a table, and a summary."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qwen_dist.batch.jsonl import count_records
from qwen_dist.batch.run import BatchSummary
from qwen_dist.batch.series import TimeSeries
from qwen_dist.config import BatchConfig, parse_bytes
from qwen_dist.engine.engine import EngineStats
from qwen_dist.errors import printable
from qwen_dist.storage.line_writer import is_appendable
from qwen_dist.storage.records import read_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def batch_progress(
    files: Sequence[str], config: BatchConfig, num_before: int, console: Console
) -> Iterator[Callable[[BatchSummary, EngineStats], None]]:
    """Show a progress bar; yield the callback that updates it."""
    from rich.progress import BarColumn, Progress, TextColumn

    total = 0 if console.quiet else count_records(files, parse_bytes(config.max_line_size))
    # One text, the most important part first: a narrow terminal cuts its end.
    columns = (TextColumn("answered {task.completed}/{task.total}; {task.fields[status]}"), BarColumn(bar_width=None))
    start, left = time.monotonic(), TimeLeft()
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=total, completed=num_before, status="compiling (once)…")

        def report(summary: BatchSummary, stats: EngineStats) -> None:
            seconds, done = max(summary.seconds, 1e-9), summary.num_answered + summary.num_errors
            now = time.monotonic()
            bar.update(
                task,
                completed=num_before + done,
                status=f"{clock(now - start)}, left {left.after(now, done, total - num_before)}; "
                f"{summary.num_prompt_tokens / seconds:.0f} tokens/s in, "
                f"{summary.num_generated_tokens / seconds:.0f} out; "
                f"{stats.num_running} running, {stats.num_waiting} waiting, "
                f"cache {stats.held_positions / max(stats.cache_positions, 1):.0%}, "
                f"prefix hits {summary.num_cached_tokens / max(summary.num_prompt_tokens, 1):.0%}",
            )

        yield report


class TimeLeft:
    """The time that is left by the rate since the first results, so that compiling does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def after(self, now: float, done: int, total: int) -> str:
        """Return the time left as text; a dash while there is no rate."""
        if self._first is None:
            self._first = (now, done) if done else None
            return "–"
        start, before = self._first
        return "–" if done == before else clock((now - start) / (done - before) * max(total - done, 0))


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def series_table(series: TimeSeries) -> Table:
    """Return a table of the throughput and load of a batch on this process."""
    from rich.table import Table

    last, table = series.samples[-1], Table()
    for column in ("", "total", "mean", "peak"):
        table.add_column(column, justify="right" if column else "left")
    for name, field in (("prompt tokens", "num_prompt_tokens"), ("generated tokens", "num_generated_tokens")):
        speeds = [speed for _, speed in series.rates(field)]
        total = getattr(last, field)
        mean = f"{total / max(last.seconds, 1e-9):.1f}/s"
        table.add_row(name, str(total), mean, f"{max(speeds, default=0):.1f}/s")
    for name, field, form in (("running requests", "num_running", ".1f"), ("KV cache used", "cache_utilization", ".0%")):
        most = max(getattr(sample, field) for sample in series.samples)
        table.add_row(name, "", f"{series.mean(field):{form}}", f"{most:{form}}")
    return table


def count_errors(output: str) -> dict[str, int]:
    """Return how many results in a local file of lines are errors, by message; an empty dictionary for other outputs."""
    kinds: dict[str, int] = {}
    if not is_appendable(output) or not os.path.isfile(output):
        return kinds
    for line in read_lines(output):
        if b'"error"' in line:
            error = json.loads(line).get("error")
            message = error.get("message") if isinstance(error, dict) else error
            if message:
                # Numbers and names differ from record to record.
                kind = printable(re.sub(r"\d+", "N", str(message)), 100)
                kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def count_left(files: Sequence[str], config: BatchConfig, summary: BatchSummary) -> int:
    """Return how many records of the files have no result yet."""
    total = count_records(files, parse_bytes(config.max_line_size))
    return max(0, total - summary.num_before - summary.num_answered - summary.num_errors)


def describe_summary(summary: BatchSummary, output: str, kinds: dict[str, int], *, num_left: int | None) -> str:
    """Return the result of a run in one to three sentences.

    Args:
      summary: the counts.
      output: the file with the results.
      kinds: messages of records that ended in an error, with how many there are of each.
      num_left: records that an interrupted run has not answered; None for a run that is complete.
    """
    if num_left is None and summary.num_before and not summary.num_answered + summary.num_errors:
        return f"nothing to do: all {summary.num_before} records have a result in {output}"
    speed = summary.num_generated_tokens / max(summary.seconds, 1e-9)
    cached = f" ({summary.num_cached_tokens} of them cached)" if summary.num_cached_tokens else ""
    before = f"{summary.num_before} done before; " if summary.num_before else ""
    lines = [
        f"{before}{summary.num_answered} answered, {summary.num_errors} with an error; {summary.num_prompt_tokens} "
        f"prompt tokens{cached} and {summary.num_generated_tokens} generated tokens in {summary.seconds:.1f} s "
        f"({speed:.1f} tokens/s): {output}"
    ]
    if kinds:
        most = sorted(kinds.items(), key=lambda kind: -kind[1])[:5]
        listed = "; ".join(f"{count} × {message}" for message, count in most)
        lines.append(f'errors, in the lines with "error" of {output}: {listed}; --retry-errors tries them again')
    if num_left is not None:
        lines.append(f"interrupted: run the same command to continue ({num_left:,} left)")
    return "\n".join(lines)
