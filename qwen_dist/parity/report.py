"""What a comparison found, as a table in the terminal; the page for a browser is `page`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen_dist.parity.bounds import Section
from qwen_dist.parity.compare import METRICS, SECTIONS, ParityReport, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(report: ParityReport, console: Console) -> None:
    """Print one line for each kind of component, with the worst of its layers, and the verdict."""
    for name, fact in report.facts.items():
        console.print(f"[dim]{name}:[/] {fact}", soft_wrap=True)
    for section, title in SECTIONS.items():
        rows = [row for row in report.rows if row.section == section]
        if section == "parameters" and all(row.is_within for row in rows):
            console.print(f"\n[bold]{section}:[/] {len(rows)}, each equal in name, shape and every bit\n")
        elif rows:
            console.print(_table(section, title, rows))
    color = "green" if report.ok else "red"
    console.print(f"[bold {color}]{report.verdict()}[/]", soft_wrap=True)


def _table(section: Section, title: str, rows: list[Row]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{section}: {title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("component", no_wrap=True)
    for heading in ("max |Δ|", "max |Δ/ref|", "‖Δ‖/‖ref‖", "max ulp", "1 - cosine", "judged by", "worst", "bound", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, group in by_kind(rows).items():
        table.add_row(kind, *_cells(group))
    return table


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that differ only in their layer or step, together: `layers.*.output`."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"(?<=[._])\d+", "*", row.name), []).append(row)
    return kinds


def _cells(group: list[Row]) -> list[str]:
    worst = worst_of(group)
    found = [row.difference for row in group if row.difference is not None]
    # Where terms cancel, the distance in units of the last place says nothing.
    is_smooth = worst.metric != "ratio" and worst.name.endswith(("norm", ".weights", "embed_tokens"))
    has_ulps = is_smooth or worst.section == "parameters"
    ulps = [each.max_ulp for each in found if each.max_ulp is not None and has_ulps]
    numbers = [
        number(max(values)) if values else ""
        for values in (
            [each.max_abs for each in found],
            [each.max_rel for each in found],
            [each.relative for each in found],
            ulps,
            [1 - each.cosine for each in found],
        )
    ]
    bound = "" if worst.limit is None else number(worst.limit)
    mark = "" if worst.limit is None else "[green]✓[/]" if worst.is_within else "[bold red]✗[/]"
    where = f" (×{len(group)})" if len(group) > 1 else ""
    return [*numbers, METRICS[worst.metric], number(worst.measured) + where, bound, mark]


def worst_of(group: list[Row]) -> Row:
    """The row that is furthest beyond its bound, or nearest to it; a NaN is the furthest."""
    return max(group, key=lambda row: (not row.is_within, row.measured != row.measured, row.measured))


def number(value: float) -> str:
    """Three digits at most."""
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
