"""Show a plan as tables, as JSON, or as an HTML chart of the memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen_dist.charts import COLORS, legend, page, section, stacked_bars, write_page
from qwen_dist.planning.plan import CapacityPlan, MeshPlan, PhasePlan, StepTime

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def to_json(plan: CapacityPlan) -> str:
    """Return the whole plan as JSON, with sums and totals added; in bytes and seconds."""
    content = dataclasses.asdict(plan)
    plans = zip((plan.chosen, *plan.proposals), (content["chosen"], *content["proposals"]), strict=True)
    for one, given in plans:
        quantization = one.workload.quantization
        given["workload"]["quantization"] = None if quantization is None else str(quantization)
    for phase, given in zip(plan.chosen.phases, content["chosen"]["phases"], strict=True):
        given["device_bytes"] = phase.device_bytes
        for name, step in (("step", phase.step), ("compiled_step", phase.compiled_step)):
            if step is not None:
                given[name]["total"] = step.total
    return json.dumps(content, indent=2)


def print_plan(plan: CapacityPlan, console: Console) -> None:
    """Print the plan as tables."""
    chosen, chip = plan.chosen, plan.topology.chip
    work, num_devices = chosen.workload, plan.topology.num_devices
    console.print(
        f"[bold]{_escape(plan.model)}[/]  {format_count(chosen.num_parameters)} parameters, {work.dtype}"
        f"{'' if work.quantization is None else f', {work.quantization}'}; "
        f"{num_devices} {'device' if num_devices == 1 else 'devices'} of {plan.topology.name}, "
        f"{_gb(chip.memory_bytes)} each; mesh "
        f"[bold]{chosen.mesh or 'data=1'}[/]; {work.command}, {work.batch} sequences of {work.context} tokens",
        highlight=False,
    )
    console.print(_memory_table(plan))
    if any(phase.step for phase in chosen.phases):
        console.print(_time_table(chosen.phases))
    for phase in chosen.phases:
        if phase.compile_error:
            console.print(f"[red]{phase.phase} does not compile[/]  {_escape(phase.compile_error)}", highlight=False)
        if phase.compiled is not None:
            console.print(_compiled_line(phase, plan), highlight=False)
    console.print(
        f"largest batch at this context: {plan.max_batch or 'none'}; largest context at this batch: "
        f"{plan.max_context or 'none'}; "
        + "; ".join(f"{axis} alone can be {', '.join(map(str, sizes))}" for axis, sizes in plan.legal_axis_sizes.items()),
        highlight=False,
    )
    if plan.proposals:
        console.print(_proposal_table(plan.proposals))
    fits = "[green]fits[/]" if chosen.fits else "[red]does not fit[/]"
    needed = max(phase.needed_bytes for phase in chosen.phases)
    console.print(f"{fits}: {_gb(needed)} of {_gb(chip.memory_bytes)} per device", highlight=False)


def format_count(number: int) -> str:
    """Return a number of parameters with its unit: 7.62 B, 494 M, 12 k."""
    size, unit = next(((size, unit) for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if number >= size), (1, ""))
    return f"{number / size:.3g}{unit}"


def _escape(text: str) -> str:
    """Escape console markup."""
    from rich.markup import escape

    return escape(text)


def _memory_table(plan: CapacityPlan) -> Table:
    phases = plan.chosen.phases
    table = _table("memory, GB per device", (phase.phase for phase in phases))
    kinds = dict.fromkeys(kind for phase in phases for kind in phase.memory)
    for kind in kinds:
        table.add_row(kind, *(_number(phase.memory.get(kind), 1e9) for phase in phases))
    table.add_row("[bold]sum[/]", *(f"[bold]{_number(phase.device_bytes, 1e9)}[/]" for phase in phases))
    if any(phase.compiled for phase in phases):
        table.add_row("compiler", *(_number(compiled_bytes(phase), 1e9) for phase in phases))
    return table


def compiled_bytes(phase: PhasePlan) -> float | None:
    """Return the peak memory of the compiled program on each device, in bytes."""
    return None if phase.compiled is None else phase.compiled.device_bytes


def _time_table(phases: Iterable[PhasePlan]) -> Table:
    table = _table("one step, ms", ("compute", "memory", "collectives", "step", "floor"))
    for phase in phases:
        floor = None if phase.step is None else dataclasses.replace(phase.step, collectives=0).total
        for name, step in ((f"{phase.phase}, estimate", phase.step), (f"{phase.phase}, compiled", phase.compiled_step)):
            if step is not None:
                table.add_row(name, *_milliseconds(step), _number(floor, 1e-3))
    return table


def _milliseconds(step: StepTime) -> list[str]:
    return [_number(seconds, 1e-3) for seconds in (step.compute, step.memory, step.collectives, step.total)]


def _compiled_line(phase: PhasePlan, plan: CapacityPlan) -> str:
    compiled = phase.compiled
    assert compiled is not None
    received = ", ".join(f"{one.count:.0f} {one.kind} {_gb(one.bytes)}" for one in compiled.collectives) or "none"
    how = f"from {' and '.join(map(str, plan.compiled_layers))} layers, " if len(plan.compiled_layers) > 1 else ""
    return (
        f"{phase.phase} compiled ({how}{compiled.seconds:.0f} s): arguments {_gb(compiled.argument_bytes)}, peak "
        f"{_gb(compiled.device_bytes)}, {compiled.flops:.3g} flops, {_gb(compiled.bytes_accessed)} accessed; "
        f"collectives: {received}"
    )


def _proposal_table(proposals: Iterable[MeshPlan]) -> Table:
    table = _table("mesh", ("batch", "GB per device", "fits", "µs per token"))
    for plan in proposals:
        numbers = (_number(plan.device_bytes, 1e9), _yes_no(plan.fits), _number(plan.seconds_per_token, 1e-6))
        table.add_row(plan.mesh or "data=1", str(plan.workload.batch), *numbers)
    return table


def _table(first: str, columns: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(first, box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _number(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value / unit:.3g}" if value < 100 * unit else f"{value / unit:,.0f}"


def _gb(size: float) -> str:
    return f"{_number(size, 1e9)} GB"


def write_chart(plan: CapacityPlan, path: str) -> None:
    """Write a self-contained HTML page: one bar per program with the memory of a device by kind, and its limit."""
    limit = plan.topology.chip.memory_bytes
    bars: list[tuple[str, dict[str, float]]] = []
    for phase in plan.chosen.phases:
        bars.append((f"{phase.phase}, estimate", dict(phase.memory)))
        if (compiled := phase.compiled) is not None:
            others = compiled.device_bytes - compiled.argument_bytes
            bars.append((f"{phase.phase}, compiled", {"arguments": compiled.argument_bytes, "others": others}))
    kinds = dict.fromkeys(kind for _, bar in bars for kind in bar)
    colors = {kind: COLORS[index % len(COLORS)] for index, kind in enumerate(kinds)}
    title = f"{plan.model} on {plan.topology.name}, mesh {plan.chosen.mesh or 'data=1'}"
    text = f"GB per device, of {_gb(limit)}. {legend(colors)}"
    write_page(path, page(title, section("Memory", text, stacked_bars(bars, limit, colors, 1e9))))
