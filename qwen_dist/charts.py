"""Reports as self-contained pages of HTML, with charts as inline SVG and without scripts, all in one style. No jax."""

from __future__ import annotations

import dataclasses
import html
import math
import pathlib
from collections.abc import Iterable, Mapping

from qwen_dist.errors import UserError, printable

# Of the lines, bars and dots of a chart, in this order.
COLORS = ("#2b62d9", "#e08a00", "#d6336c", "#0c9c8d", "#7b4fd0", "#9c6b4e")
_STYLE = """
:root{--ink:#1d2430;--soft:#67718a;--line:#e3e7ee;--paper:#fff;--good:#14804a;--bad:#c22f2f;--accent:#2b62d9}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f9;color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px} h2{font-size:18px;margin:0 0 2px} p{margin:0 0 12px;color:var(--soft);max-width:80ch}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:18px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:14px 0 0} dt{color:var(--soft)} dd{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:24px} svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft)} svg .strong{fill:var(--ink)}
.grid{stroke:var(--line)} .bound{stroke:var(--bad);stroke-dasharray:5 4} svg .bound-label{fill:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:13px} th{text-align:right;color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left} td{text-align:right;font-variant-numeric:tabular-nums}
td,th{padding:2px 8px;border-bottom:1px solid var(--line)}
td:first-child{font-family:ui-monospace,"DejaVu Sans Mono",monospace}
tr.bad td{color:var(--bad);font-weight:600} summary{cursor:pointer;color:var(--accent)}
"""


def page(title: str, *sections: str, style: str = "") -> str:
    """Return a page; `style` is CSS for it alone."""
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}{style}</style><main><h1>{title}</h1>{''.join(sections)}</main></html>\n"
    )


def write_page(path: str | pathlib.Path, content: str) -> None:
    """Write a page to a file. Raises UserError if that fails."""
    try:
        pathlib.Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page {printable(path)} cannot be written: {error.strerror}") from None


def section(title: str, text: str, body: str) -> str:
    """Return a part of a page from HTML; nothing if the body is empty."""
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>" if body else ""


def legend(colors: Mapping[str, str]) -> str:
    """Return names with a dot of their color."""
    return " · ".join(f'<span style="color:{color}">●</span> {html.escape(name)}' for name, color in colors.items())


def table(head: Iterable[str], rows: Iterable[tuple[Iterable[str], bool]]) -> str:
    """Return a table of cells of HTML; each row comes with whether it is marked as bad."""
    lines = (
        f"<tr{' class=bad' * is_bad}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells, is_bad in rows
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(lines)}</table>"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A plotting area inside a viewBox. `x` and `y` map values to its coordinates."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 1060
    height: int = 300
    is_log: bool = False

    left, right, top, bottom = 64, 12, 12, 34

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low or 1) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.height - self.bottom - (value - low) / (high - low or 1) * (self.height - self.top - self.bottom)

    def frame(self, x_label: str, y_ticks: Iterable[float], x_ticks: Iterable[float]) -> str:
        """Return the axes: lines and numbers at the ticks, and the name of the x axis."""
        right, base = self.width - self.right, self.height - self.bottom
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick, self.is_log)}</text>')
        for tick in x_ticks:
            parts.append(f'<text x="{self.x(tick):.1f}" y="{base + 15}" text-anchor="middle">{_tick(tick, False)}</text>')
        parts.append(f'<text x="{(self.left + right) / 2}" y="{self.height - 3}" text-anchor="middle">{x_label}</text>')
        return "".join(parts)

    def dot(self, x: float, y: float, color: str, title: str = "", radius: float = 2.6, opacity: float = 0.85) -> str:
        """Return a dot with a text that shows when the pointer is over it."""
        hint = f"<title>{html.escape(title)}</title>" if title else ""
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"'
        return f'<circle {place} fill="{color}" fill-opacity="{opacity}">{hint}</circle>'

    def line(self, points: Iterable[tuple[float, float]], color: str, width: float = 1.5) -> str:
        """Return a line through the points."""
        drawn = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="{width}"/>'

    def bound(self, value: float, label: str) -> str:
        """Return a horizontal line at a limit."""
        y, right = self.y(value), self.width - self.right
        line = f'<line class="bound" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return line + f'<text class="bound-label" x="{right - 4}" y="{y - 4:.1f}" text-anchor="end">{label}</text>'

    def svg(self, *parts: str) -> str:
        """Return the whole chart."""
        return f'<svg viewBox="0 0 {self.width} {self.height}">{"".join(parts)}</svg>'


def _tick(value: float, is_log: bool) -> str:
    return f"1e{round(math.log10(value))}" if is_log else f"{value:g}"


def decades(values: Iterable[float]) -> tuple[float, float, list[float]]:
    """Return a logarithmic range around the positive values, and its ticks."""
    exponents = [math.log10(value) for value in values if 0 < value < math.inf] or [-16.0]
    low, high = math.floor(min(exponents) - 0.2), math.ceil(max(exponents) + 0.2)
    step = max(1, (high - low) // 8)
    return 10.0**low, 10.0**high, [10.0**e for e in range(low, high + 1, step)]


def round_ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = step if (high - low) / step > 4 else step / 2
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def axis_end(largest: float) -> float:
    """Return the smallest number with one digit, and zeros, that is not below the largest value."""
    if not 0 < largest < math.inf:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(largest))
    return math.ceil(round(largest / scale, 9)) * scale


def stacked_bars(
    bars: Iterable[tuple[str, Mapping[str, float]]], limit: float, colors: Mapping[str, str], unit: float
) -> str:
    """Return horizontal bars, each with its name and parts, beside a common limit; numbers are shown in `unit`s."""
    bars = list(bars)
    widest = max(limit, *(sum(parts.values()) for _, parts in bars)) or 1
    chart, parts = Chart((0, widest), (0, 1), height=64 * len(bars) + 30), []
    for row, (name, sizes) in enumerate(bars):
        top, start = 64 * row + 24, 0.0
        label = f"{html.escape(name)}: {sum(sizes.values()) / unit:.3g}"
        parts.append(f'<text class="strong" x="{chart.left}" y="{top - 6}">{label}</text>')
        for kind, size in sizes.items():
            place = f'x="{chart.x(start):.1f}" y="{top}" width="{chart.x(size) - chart.left:.1f}" height="32"'
            hint = f"<title>{html.escape(kind)}: {size / unit:.3g}</title>"
            parts.append(f'<rect {place} fill="{colors[kind]}">{hint}</rect>')
            start += size
    x = chart.x(limit)
    parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{chart.height - 26}"/>')
    parts.append(f'<text x="{x:.1f}" y="{chart.height - 10}" text-anchor="end">limit: {limit / unit:.3g}</text>')
    return chart.svg(*parts)
