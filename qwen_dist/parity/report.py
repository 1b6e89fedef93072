"""The report as tables in the terminal. `page` has the HTML report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen_dist.parity.checks import METRICS, SECTIONS, Check, ParityReport
from qwen_dist.parity.tolerances import Section

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_report(report: ParityReport, console: Console) -> None:
    """Print one line per component, with the worst of its layers, and the verdict."""
    for name, fact in report.facts.items():
        console.print(f"[dim]{name}:[/] {fact}", soft_wrap=True)
    for section, title in SECTIONS.items():
        checks = [check for check in report.checks if check.section == section]
        if section == "parameters" and all(check.is_within for check in checks):
            console.print(f"\n[bold]{section}:[/] {len(checks)}, each equal in name, shape and every bit\n")
        elif checks:
            console.print(_table(section, title, checks))
    color = ("green" if report.is_judged else "yellow") if report.ok else "red"
    console.print(f"[bold {color}]{report.verdict()}[/]", soft_wrap=True)


def _table(section: Section, title: str, checks: list[Check]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{section}: {title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("component", no_wrap=True)
    for heading in ("max |Δ|", "max |Δ/ref|", "‖Δ‖/‖ref‖", "max ulp", "1 - cosine", "judged by", "worst", "bound", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for component, group in by_component(checks).items():
        table.add_row(component, *_cells(group))
    return table


def by_component(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """Group the checks that differ only in layer or step, under names such as `layers.*.output`."""
    components: dict[str, list[Check]] = {}
    for check in checks:
        components.setdefault(re.sub(r"(?<=[._])\d+", "*", check.name), []).append(check)
    return components


def _cells(group: list[Check]) -> list[str]:
    worst = worst_check(group)
    found = [check.difference for check in group if check.difference is not None]
    # Where terms cancel, ulps say nothing.
    is_smooth = worst.metric != "ratio" and worst.name.endswith(("norm", ".weights", "embed_tokens"))
    has_ulps = is_smooth or worst.section == "parameters"
    ulps = [each.max_ulp for each in found if each.max_ulp is not None and has_ulps]
    numbers = [
        format_number(max(values)) if values else ""
        for values in (
            [each.max_abs for each in found],
            [each.max_rel for each in found],
            [each.relative for each in found],
            ulps,
            [1 - each.cosine for each in found],
        )
    ]
    bound = "" if worst.limit is None else format_number(worst.limit)
    mark = "" if worst.limit is None else "[green]✓[/]" if worst.is_within else "[bold red]✗[/]"
    where = f" (×{len(group)})" if len(group) > 1 else ""
    return [*numbers, METRICS[worst.metric], format_number(worst.measured) + where, bound, mark]


def worst_check(group: list[Check]) -> Check:
    """Return the check that is furthest beyond its bound, or nearest to it; NaN is the furthest."""
    return max(group, key=lambda check: (not check.is_within, check.measured != check.measured, check.measured))


def format_number(value: float) -> str:
    """Format a number with at most three significant digits."""
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
