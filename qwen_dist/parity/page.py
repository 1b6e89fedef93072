"""The report as one self-contained HTML page."""

from __future__ import annotations

import html
import math
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from qwen_dist import charts
from qwen_dist.charts import Chart, decades, legend, round_ticks, section
from qwen_dist.parity.checks import METRICS, SECTIONS, Check, ParityReport
from qwen_dist.parity.report import format_number
from qwen_dist.parity.tolerances import Section

_STYLE = """
.verdict{border-left:6px solid var(--good)} .verdict.bad{border-left-color:var(--bad)}
.verdict.open{border-left-color:#b7791f} .verdict.open b{color:#b7791f!important}
.verdict b{color:var(--good);font-size:17px} .verdict.bad b{color:var(--bad)}
"""
# One color per group of components: the first pattern that matches.
_COMPONENT_COLORS = (
    ("norms", "norm", "#7b4fd0"),
    ("rope", "rope", "#e08a00"),
    ("attention", r"weights|mixed|o_proj", "#d6336c"),
    ("q, k, v", r"[qkv]_proj", "#2b62d9"),
    ("MLP", "mlp", "#0c9c8d"),
    ("residual stream", "residual|output", "#4a5568"),
    ("embedding, logits", "", "#96a0b5"),
)
_LAYERS_TITLE = "Error by layer and component"


def write_html(report: ParityReport, path: str | pathlib.Path) -> None:
    """Write the page. Raises UserError if it cannot be written."""
    charts.write_page(path, to_html(report))


def to_html(report: ParityReport) -> str:
    """Return the page as HTML."""
    title = f"Parity with PyTorch: {report.facts['checkpoint']}, {report.facts['dtype']}"
    parts = [_verdict, _along_the_model, _heat_maps, _logits, _positions, _tables]
    return charts.page(title, *(part(report) for part in parts), style=_STYLE)


def _verdict(report: ParityReport) -> str:
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in report.facts.items())
    word, kind = ("Within bounds", "") if report.ok else ("Beyond bounds", " bad")
    word, kind = (word, kind) if report.is_judged or not report.ok else ("Not judged", " open")
    text = html.escape(report.verdict().partition(": ")[2])
    return f'<section class="verdict{kind}"><b>{word}</b><div>{text}</div><dl>{facts}</dl></section>'


def _judged(report: ParityReport) -> list[tuple[Section, list[Check]]]:
    sections: tuple[Section, ...] = ("same inputs", "whole model")
    found = [(s, [r for r in report.checks if r.section == s and r.difference is not None]) for s in sections]
    return [(section, checks) for section, checks in found if checks]


def _error(check: Check) -> float:
    """Return the error that the charts show: the largest if it is judged, else the relative one."""
    assert check.difference is not None
    return check.difference.max_abs if check.metric == "max_abs" else check.difference.relative


def _color(name: str) -> str:
    return next(color for _, pattern, color in _COMPONENT_COLORS if re.search(pattern, name))


def _along_the_model(report: ParityReport) -> str:
    body = ""
    for name, checks in _judged(report):
        # Checks with another metric (a ratio) or the limit 0 do not fit on this scale.
        bounds = {check.limit for check in checks if check.limit and check.metric in ("max_abs", "relative")}
        low, high, ticks = decades([_error(check) for check in checks] + sorted(bounds))
        chart = Chart((0, len(checks) - 1), (low, high), is_log=True)
        layers = [(i, check) for i, check in enumerate(checks) if check.name.endswith("input_layernorm")]
        marks = "".join(
            f'<line class="grid" x1="{chart.x(i - 0.5):.1f}" x2="{chart.x(i - 0.5):.1f}" y1="12" y2="{chart.height - 34}"/>'
            f'<text x="{chart.x(i) + 1:.1f}" y="{chart.height - 19}">{check.name.split(".")[1]}</text>'
            for i, check in layers
        )
        dots = "".join(
            chart.dot(i, _error(check), _color(check.name), f"{check.name}: {_error(check):.2e}")
            for i, check in enumerate(checks)
        )
        lines = "".join(chart.bound(limit, f"bound {format_number(limit)}") for limit in sorted(bounds))
        frame = chart.frame("layer", ticks, ())
        body += f"<h3>{name}: {SECTIONS[name]}</h3>" + chart.svg(frame, marks, lines, dots)
    colors = legend({name: color for name, _, color in _COMPONENT_COLORS})
    metric = "max |Δ|" if report.facts["dtype"] == "float64" else "‖Δ‖/‖ref‖"
    versus = "PyTorch (whole model: in float64)" if report.facts["dtype"] == "bfloat16" else "PyTorch"
    text = f"{metric} against {versus}, logarithmic, in the order of computation; zero is drawn at the bottom. {colors}"
    return section("Error along the model", text, body)


def _heat_maps(report: ParityReport) -> str:
    body = "".join(f"<h3>{name}</h3>" + _heat_map(checks, _error) for name, checks in _judged(report))
    gradients = [check for check in report.checks if check.section == "gradient" and check.difference is not None]
    if gradients:
        body += "<h3>gradient</h3>" + _heat_map(gradients, _error)
    return section(_LAYERS_TITLE, "The same errors and those of the gradient, one cell each: darker is larger.", body)


def _heat_map(checks: Sequence[Check], value: Callable[[Check], float]) -> str:
    cells = [
        (match[2], int(match[1]), check) for check in checks if (match := re.match(r"layers\.(\d+)\.(.*)", check.name))
    ]
    kinds = list(dict.fromkeys(kind for kind, _, _ in cells))
    if not cells:
        return ""
    shown = [value(check) for _, _, check in cells if 0 < value(check) < math.inf] or [1e-16]
    low, high = min(shown), max(max(shown), 2 * min(shown))
    num_layers = max(layer for _, layer, _ in cells) + 1
    left, size = 210, 16
    width = (1060 - left - 90) / max(num_layers, 8)
    parts = []
    for y, kind in enumerate(kinds):
        parts.append(
            f'<text class="strong" x="{left - 8}" y="{y * size + 13}" text-anchor="end">{html.escape(kind)}</text>'
        )
    for layer in range(num_layers):
        x = left + (layer + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{len(kinds) * size + 14}" text-anchor="middle">{layer}</text>')
    for kind, layer, check in cells:
        place = f'x="{left + layer * width:.1f}" y="{kinds.index(kind) * size}" width="{width - 1:.1f}" height="{size - 1}"'
        hint = f"<title>{html.escape(check.name)}: {value(check):.2e}</title>"
        parts.append(f'<rect {place} fill="{_shade(value(check), low, high)}">{hint}</rect>')
    for i, exponent in enumerate(np.linspace(math.log10(low), math.log10(high), 5)):
        place = f'x="1000" y="{i * size * 1.2:.1f}" width="14" height="{size * 1.2:.1f}"'
        parts.append(f'<rect {place} fill="{_shade(10**exponent, low, high)}"/>')
        parts.append(f'<text x="1018" y="{i * size * 1.2 + 13:.1f}">{10**exponent:.0e}</text>')
    return f'<svg viewBox="0 0 1060 {len(kinds) * size + 20}">{"".join(parts)}</svg>'


def _shade(value: float, low: float, high: float) -> str:
    """Return a color from pale to dark blue on a logarithmic scale; zero is almost white, a non-finite value red."""
    if not math.isfinite(value):
        return "#c22f2f"
    if value <= 0:
        return "#f1f3f7"
    share = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
    pale, dark = (214, 228, 250), (16, 44, 110)
    return "#" + "".join(f"{round(a + (b - a) * min(1, max(0, share))):02x}" for a, b in zip(pale, dark, strict=True))


def _logits(report: ParityReport) -> str:
    points = report.logit_pairs
    if not np.isfinite(points).all():
        return section("Logits", "Not all logits are finite.", " ")
    low, high = float(points.min()), float(points.max())
    ticks = round_ticks(low, high)
    both = Chart((low, high), (low, high), 520, 320)
    diagonal = f'<line class="grid" x1="{both.x(low)}" y1="{both.y(low)}" x2="{both.x(high)}" y2="{both.y(high)}"/>'
    left = both.svg(both.frame("reference", ticks, ticks), diagonal, _dots(both, points[:, 0], points[:, 1]))
    delta = points[:, 1] - points[:, 0]
    reach = float(np.abs(delta).max()) or 1e-16
    apart = Chart((low, high), (-reach, reach), 520, 320)
    scale = [-reach, 0.0, reach]
    right = apart.svg(
        apart.frame("reference", [float(f"{s:.2g}") for s in scale], ticks), _dots(apart, points[:, 0], delta)
    )
    text = f"{len(points)} randomly chosen logits: left, ours against the reference's; right, the difference."
    return section("Logits", text, f'<div class="pair"><div>{left}</div><div>{right}</div></div>')


def _dots(chart: Chart, xs: np.ndarray, ys: np.ndarray) -> str:
    pairs = zip(xs.tolist(), ys.tolist(), strict=True)
    return "".join(chart.dot(x, y, "#2b62d9", radius=1.7, opacity=0.35) for x, y in pairs)


def _positions(report: ParityReport) -> str:
    found = report.next_token
    low, high, ticks = decades(found.kl.tolist())
    last = int(found.position.max())
    kl = Chart((0, last), (low, high), height=220, is_log=True)
    dots = "".join(
        kl.dot(p, k, "#2b62d9" if same else "#c22f2f", f"position {p}: KL {k:.2e}", 2.6 if same else 4.2)
        for p, k, same in zip(found.position.tolist(), found.kl.tolist(), found.same_top1.tolist(), strict=True)
    )
    upper = kl.svg(kl.frame("position in the row", ticks, round_ticks(0, last)), dots)
    share = Chart((0, last), (0, 1), height=150)
    by_position = [
        share.dot(p, float(values[found.position == p].mean()), color, f"position {p}")
        for values, color in ((found.same_top5, "#0c9c8d"), (found.same_top1, "#2b62d9"))
        for p in np.unique(found.position).tolist()
    ]
    lower = share.svg(share.frame("position in the row", (0, 0.5, 1), round_ticks(0, last)), *by_position)
    text = (
        "The distribution of the next token at every position. Above: KL(reference ‖ ours) in nats, "
        '<span style="color:#c22f2f">●</span> where the likeliest token differs. Below: agreement, averaged over the rows, '
        'of the likeliest token <span style="color:#2b62d9">●</span> and of the five likeliest '
        '<span style="color:#0c9c8d">●</span>.'
    )
    return section("Next token by position", text, upper + lower)


def _tables(report: ParityReport) -> str:
    body, head = "", ("component", "max |Δ|", "‖Δ‖/‖ref‖", "ulp", "judged by", "found", "bound")
    for name, title in SECTIONS.items():
        checks = [check for check in report.checks if check.section == name]
        if checks:
            opened = "" if all(check.is_within for check in checks) else " open"
            rows = ((_table_cells(check), not check.is_within) for check in checks)
            body += (
                f"<details{opened}><summary>{name}: {title} ({len(checks)})</summary>{charts.table(head, rows)}</details>"
            )
    return section("Every comparison", "In the order of computation.", body)


def _table_cells(check: Check) -> list[str]:
    found = check.difference
    measured = ["", "", ""]
    if found is not None:
        measured = [
            format_number(found.max_abs),
            format_number(found.relative),
            "" if found.max_ulp is None else format_number(found.max_ulp),
        ]
    limit = "" if check.limit is None else format_number(check.limit)
    name = html.escape(check.name) + (f"<br>{html.escape(check.where)}" if check.where else "")
    return [name, *measured, METRICS[check.metric], format_number(check.measured), limit]
