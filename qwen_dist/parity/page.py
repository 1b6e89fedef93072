"""The report as one self-contained HTML page: inline SVG, no scripts."""

from __future__ import annotations

import dataclasses
import html
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qwen_dist.errors import UserError
from qwen_dist.parity.checks import METRICS, SECTIONS, Check, ParityReport
from qwen_dist.parity.report import format_number
from qwen_dist.parity.tolerances import Section

_STYLE = """
:root{--ink:#1d2430;--soft:#67718a;--line:#e3e7ee;--paper:#fff;--good:#14804a;--bad:#c22f2f;--accent:#2b62d9}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f9;color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px} h2{font-size:18px;margin:0 0 2px} p{margin:0 0 12px;color:var(--soft);max-width:80ch}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:18px 0}
.verdict{border-left:6px solid var(--good)} .verdict.bad{border-left-color:var(--bad)}
.verdict.open{border-left-color:#b7791f} .verdict.open b{color:#b7791f!important}
.verdict b{color:var(--good);font-size:17px} .verdict.bad b{color:var(--bad)}
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
    """Write the page.

    Raises:
      UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).write_text(to_html(report), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {path}: {error.strerror}") from None


def to_html(report: ParityReport) -> str:
    """Return the page as HTML."""
    title = f"Parity with PyTorch: {html.escape(report.facts['checkpoint'])}, {html.escape(report.facts['dtype'])}"
    sections = [_verdict(title, report), _along_the_model(report), _heat_maps(report), _logits(report), _positions(report)]
    sections += [_tables(report)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>" if body else ""


def _verdict(title: str, report: ParityReport) -> str:
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in report.facts.items())
    word, kind = ("Within bounds", "") if report.ok else ("Beyond bounds", " bad")
    word, kind = (word, kind) if report.is_judged or not report.ok else ("Not judged", " open")
    text = html.escape(report.verdict().partition(": ")[2])
    return f'<h1>{title}</h1><section class="verdict{kind}"><b>{word}</b><div>{text}</div><dl>{facts}</dl></section>'


@dataclasses.dataclass(frozen=True)
class _Chart:
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
        hint = f"<title>{html.escape(title)}</title>" if title else ""
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"'
        return f'<circle {place} fill="{color}" fill-opacity="{opacity}">{hint}</circle>'

    def bound(self, value: float, label: str) -> str:
        y, right = self.y(value), self.width - self.right
        line = f'<line class="bound" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return line + f'<text class="bound-label" x="{right - 4}" y="{y - 4:.1f}" text-anchor="end">{label}</text>'

    def svg(self, *parts: str) -> str:
        return f'<svg viewBox="0 0 {self.width} {self.height}">{"".join(parts)}</svg>'


def _tick(value: float, is_log: bool) -> str:
    return f"1e{round(math.log10(value))}" if is_log else f"{value:g}"


def _decades(values: Iterable[float]) -> tuple[float, float, list[float]]:
    """Return a logarithmic range around the positive values, and its ticks."""
    exponents = [math.log10(value) for value in values if 0 < value < math.inf] or [-16.0]
    low, high = math.floor(min(exponents) - 0.2), math.ceil(max(exponents) + 0.2)
    step = max(1, (high - low) // 8)
    return 10.0**low, 10.0**high, [10.0**e for e in range(low, high + 1, step)]


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
    for section, checks in _judged(report):
        # Checks with another metric (a ratio) or the limit 0 do not fit on this scale.
        bounds = {check.limit for check in checks if check.limit and check.metric in ("max_abs", "relative")}
        low, high, ticks = _decades([_error(check) for check in checks] + sorted(bounds))
        chart = _Chart((0, len(checks) - 1), (low, high), is_log=True)
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
        body += f"<h3>{section}: {SECTIONS[section]}</h3>" + chart.svg(frame, marks, lines, dots)
    legend = " · ".join(f'<span style="color:{color}">●</span> {name}' for name, _, color in _COMPONENT_COLORS)
    metric = "max |Δ|" if report.facts["dtype"] == "float64" else "‖Δ‖/‖ref‖"
    versus = "PyTorch (whole model: in float64)" if report.facts["dtype"] == "bfloat16" else "PyTorch"
    text = f"{metric} against {versus}, logarithmic, in the order of computation; zero is drawn at the bottom. {legend}"
    return _section("Error along the model", text, body)


def _heat_maps(report: ParityReport) -> str:
    body = "".join(f"<h3>{section}</h3>" + _heat_map(checks, _error) for section, checks in _judged(report))
    gradients = [check for check in report.checks if check.section == "gradient" and check.difference is not None]
    if gradients:
        body += "<h3>gradient</h3>" + _heat_map(gradients, _error)
    return _section(_LAYERS_TITLE, "The same errors and those of the gradient, one cell each: darker is larger.", body)


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
        return _section("Logits", "Not all logits are finite.", " ")
    low, high = float(points.min()), float(points.max())
    ticks = _round_ticks(low, high)
    both = _Chart((low, high), (low, high), 520, 320)
    diagonal = f'<line class="grid" x1="{both.x(low)}" y1="{both.y(low)}" x2="{both.x(high)}" y2="{both.y(high)}"/>'
    left = both.svg(both.frame("reference", ticks, ticks), diagonal, _dots(both, points[:, 0], points[:, 1]))
    delta = points[:, 1] - points[:, 0]
    reach = float(np.abs(delta).max()) or 1e-16
    apart = _Chart((low, high), (-reach, reach), 520, 320)
    scale = [-reach, 0.0, reach]
    right = apart.svg(
        apart.frame("reference", [float(f"{s:.2g}") for s in scale], ticks), _dots(apart, points[:, 0], delta)
    )
    text = f"{len(points)} randomly chosen logits: left, ours against the reference's; right, the difference."
    return _section("Logits", text, f'<div class="pair"><div>{left}</div><div>{right}</div></div>')


def _dots(chart: _Chart, xs: np.ndarray, ys: np.ndarray) -> str:
    pairs = zip(xs.tolist(), ys.tolist(), strict=True)
    return "".join(chart.dot(x, y, "#2b62d9", radius=1.7, opacity=0.35) for x, y in pairs)


def _round_ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = step if (high - low) / step > 4 else step / 2
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _positions(report: ParityReport) -> str:
    found = report.next_token
    low, high, ticks = _decades(found.kl.tolist())
    last = int(found.position.max())
    kl = _Chart((0, last), (low, high), height=220, is_log=True)
    dots = "".join(
        kl.dot(p, k, "#2b62d9" if same else "#c22f2f", f"position {p}: KL {k:.2e}", 2.6 if same else 4.2)
        for p, k, same in zip(found.position.tolist(), found.kl.tolist(), found.same_top1.tolist(), strict=True)
    )
    upper = kl.svg(kl.frame("position in the row", ticks, _round_ticks(0, last)), dots)
    share = _Chart((0, last), (0, 1), height=150)
    by_position = [
        share.dot(p, float(values[found.position == p].mean()), color, f"position {p}")
        for values, color in ((found.same_top5, "#0c9c8d"), (found.same_top1, "#2b62d9"))
        for p in np.unique(found.position).tolist()
    ]
    lower = share.svg(share.frame("position in the row", (0, 0.5, 1), _round_ticks(0, last)), *by_position)
    text = (
        "The distribution of the next token at every position. Above: KL(reference ‖ ours) in nats, "
        '<span style="color:#c22f2f">●</span> where the likeliest token differs. Below: agreement, averaged over the rows, '
        'of the likeliest token <span style="color:#2b62d9">●</span> and of the five likeliest '
        '<span style="color:#0c9c8d">●</span>.'
    )
    return _section("Next token by position", text, upper + lower)


def _tables(report: ParityReport) -> str:
    body = ""
    for section, title in SECTIONS.items():
        checks = [check for check in report.checks if check.section == section]
        if checks:
            opened = "" if all(check.is_within for check in checks) else " open"
            head = "".join(
                f"<th>{h}</th>" for h in ("component", "max |Δ|", "‖Δ‖/‖ref‖", "ulp", "judged by", "found", "bound")
            )
            lines = "".join(map(_table_row, checks))
            body += f"<details{opened}><summary>{section}: {title} ({len(checks)})</summary>"
            body += f"<table><tr>{head}</tr>{lines}</table></details>"
    return _section("Every comparison", "In the order of computation.", body)


def _table_row(check: Check) -> str:
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
    cells = [name, *measured, METRICS[check.metric], format_number(check.measured), limit]
    kind = "" if check.is_within else ' class="bad"'
    return f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
