"""Plan a model on a number of devices: whether it fits, the largest batch, the time of a step and the best mesh."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qwen_dist.errors import UsageError
from qwen_dist.mesh import MeshConfig
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.planning.chips import Chip, Topology
from qwen_dist.planning.memory import Cost, CostModel, abstract_sharding_context
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext

if TYPE_CHECKING:
    from qwen_dist.planning.compile import CompilerReport

NUM_PROPOSALS = 5
MAX_BATCH = 2**24


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step: `compute` at peak flops, `memory` at memory bandwidth, `collectives` at ICI bandwidth.

    Compute and memory overlap. Collectives are assumed not to overlap with them.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.collectives


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """The plan of one program.

    Attributes:
      memory: estimated bytes on each device, by kind.
      cost: estimated cost of one step.
      loop_remainder: the part of `cost` in loop iterations that the compiler does not count.
      step: estimated time of one step. Without its collectives it is the floor.
      compiled: the compiler's report, if the program was compiled.
      compiled_step: time of one step from that report and `loop_remainder`.
      compile_error: why the program does not compile, or empty.
    """

    phase: Phase
    memory: dict[str, int]
    cost: Cost
    loop_remainder: Cost
    step: StepTime | None
    compiled: CompilerReport | None = None
    compiled_step: StepTime | None = None
    compile_error: str = ""

    @property
    def device_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def needed_bytes(self) -> float:
        """The estimate or the compiler's figure, whichever is larger."""
        return max(self.device_bytes, self.compiled.device_bytes if self.compiled else 0)


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A workload on one mesh. Its batch is the requested one, rounded up to a multiple that the mesh can split."""

    mesh: str
    workload: Workload
    num_parameters: int
    phases: tuple[PhasePlan, ...]
    fits: bool

    @property
    def device_bytes(self) -> int:
        return max(phase.device_bytes for phase in self.phases)

    @property
    def seconds_per_token(self) -> float | None:
        """Estimated time per token in decode (one token per row and step) or in training; None without a data sheet."""
        step, workload = self.phases[-1].step, self.workload
        tokens = workload.batch * (workload.context if workload.command == "finetune" else 1)
        return None if step is None else step.total / tokens


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """The result of `qwen-dist plan`.

    Attributes:
      chosen: the plan of the given mesh, or of the best proposal.
      proposals: the best meshes, when none is given.
      max_batch: the largest batch that fits at this context; None when none does.
      max_context: the largest context that fits at this batch; None when none does.
      legal_axis_sizes: the sizes that each mesh axis may have on its own.
      compiled_layers: the numbers of layers that were compiled.
    """

    model: str
    topology: Topology
    chosen: MeshPlan
    proposals: tuple[MeshPlan, ...]
    max_batch: int | None
    max_context: int | None
    legal_axis_sizes: dict[str, tuple[int, ...]]
    compiled_layers: tuple[int, ...] = ()


def make_capacity_plan(
    name: str, config: ModelConfig, topology: Topology, workload: Workload, mesh: str | None
) -> CapacityPlan:
    """Plan with the cost model. Without a mesh, take the best one.

    Raises:
      UsageError: the mesh does not divide the model and the batch, or no mesh does.
    """
    proposals = () if mesh is not None else tuple(_proposals(config, topology, workload)[:NUM_PROPOSALS])
    if mesh is None and not proposals:
        raise UsageError(f"no mesh of {topology.num_devices} devices divides the model and the batch")
    chosen = proposals[0] if mesh is None else plan_mesh(config, topology, workload, mesh)
    cost_model = _cost_model(config, topology, chosen.workload, chosen.mesh)
    axes = ("fsdp", "expert", "tensor") if config.moe else ("fsdp", "tensor")
    rounded, multiple = chosen.workload, cost_model.sharding_ctx.batch_multiple()

    def fits_with(workload: Workload) -> bool:
        return _fits(dataclasses.replace(cost_model, workload=workload), topology.chip)

    return CapacityPlan(
        model=name,
        topology=topology,
        chosen=chosen,
        proposals=proposals,
        max_batch=_largest_multiple(lambda rows: fits_with(dataclasses.replace(rounded, batch=rows)), multiple, MAX_BATCH),
        max_context=_largest_multiple(
            lambda tokens: fits_with(dataclasses.replace(rounded, context=tokens)), 64, config.max_position_embeddings
        ),
        legal_axis_sizes={axis: tuple(_legal_axis_sizes(config, topology, workload, axis)) for axis in axes},
    )


def compile_plan(plan: CapacityPlan, config: ModelConfig, layers: tuple[int, ...]) -> CapacityPlan:
    """Return the plan with a compiler report for each program.

    Args:
      plan: a plan without compiler reports.
      config: its model.
      layers: two numbers of layers to extrapolate from; empty compiles the whole model.

    Raises:
      UserError: the compiler for the topology is not installed.
    """
    from qwen_dist.planning.compile import topology_mesh

    workload = plan.chosen.workload
    sharding_ctx = ShardingContext(topology_mesh(plan.topology, MeshConfig.parse(plan.chosen.mesh)), workload.rules)
    phases = tuple(_compile_phase(phase, config, sharding_ctx, plan, layers) for phase in plan.chosen.phases)
    fits = all(not phase.compile_error and phase.needed_bytes <= plan.topology.chip.memory_bytes for phase in phases)
    chosen = dataclasses.replace(plan.chosen, phases=phases, fits=fits)
    return dataclasses.replace(plan, chosen=chosen, compiled_layers=layers or (len(config.layers),))


def parse_layers(text: str, layers: Sequence[LayerConfig]) -> tuple[int, ...]:
    """Return the two numbers of layers to extrapolate from; none for the whole model.

    What is added between them must be what is added after them: whole periods of the pattern of kinds of layers.

    Args:
      text: `all`, `auto`, or two numbers such as `3,5`.
      layers: of the model.

    Raises:
      UsageError: the numbers are not increasing or too large, or leave a part of a period.
    """
    if text == "all":
        return ()
    period, num_layers = _period(layers), len(layers)
    fewest = next((n for n in range(3, num_layers) if n % period == num_layers % period), num_layers)
    few = fewest, fewest + period * -(-2 // period)
    if text == "auto":
        return few if few[1] < num_layers else ()
    example = f"such as {few[0]},{few[1]}, or none" if few[1] <= num_layers else "or none"
    given = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(given) != 2 or not 0 < given[0] < given[1] <= num_layers:
        raise UsageError(f"--compile {text}: give two increasing numbers up to {num_layers}, {example}")
    if wrong := [number for number in given if number % period != num_layers % period]:
        raise UsageError(
            f"--compile {text}: the kinds of the {num_layers} layers repeat every {period}, so {wrong[0]} of them are not "
            f"like the model; give numbers that differ from {num_layers} by a multiple of {period}, {example}"
        )
    return given


def _period(layers: Sequence[LayerConfig]) -> int:
    """Return after how many layers their kinds repeat."""
    return next(size for size in range(1, len(layers) + 1) if layers[size:] == layers[:-size])


def plan_mesh(config: ModelConfig, topology: Topology, workload: Workload, mesh: str) -> MeshPlan:
    """Plan one mesh with the cost model. Raises UsageError when it does not fit the devices or the model."""
    multiple = abstract_sharding_context(MeshConfig.parse(mesh), topology.num_devices, workload).batch_multiple()
    workload = dataclasses.replace(workload, batch=-(-workload.batch // multiple) * multiple)
    cost_model = _cost_model(config, topology, workload, mesh)
    phases = tuple(_phase(cost_model, phase, topology.chip) for phase in workload.phases)
    return MeshPlan(mesh, workload, cost_model.num_parameters, phases, _fits(cost_model, topology.chip))


def _phase(cost_model: CostModel, phase: Phase, chip: Chip) -> PhasePlan:
    cost = cost_model.cost(phase)
    step = step_time(chip, cost.flops, cost.bytes, sum(cost.collectives.values()))
    return PhasePlan(phase, cost_model.memory(phase), cost, cost_model.loop_remainder(phase), step)


def step_time(chip: Chip, flops: float, nbytes: float, received: float) -> StepTime | None:
    """Return the time of a step; None for a chip without a data sheet."""
    if chip.flops_per_second is None or chip.bytes_per_second is None or chip.ici_bytes_per_second is None:
        return None
    return StepTime(flops / chip.flops_per_second, nbytes / chip.bytes_per_second, received / chip.ici_bytes_per_second)


def _compile_phase(
    phase: PhasePlan, config: ModelConfig, sharding_ctx: ShardingContext, plan: CapacityPlan, layers: tuple[int, ...]
) -> PhasePlan:
    from qwen_dist.planning.compile import DoesNotFit, compile_program, extrapolate, lower

    workload, chip = plan.chosen.workload, plan.topology.chip
    depths = [dataclasses.replace(config, layers=config.layers[:depth]) for depth in layers] or [config]
    try:
        compiled = [compile_program(lower(depth, sharding_ctx, workload, phase.phase)) for depth in depths]
    except DoesNotFit as error:
        return dataclasses.replace(phase, compile_error=str(error))
    report = compiled[0] if len(compiled) == 1 else extrapolate(compiled, layers, len(config.layers))
    received = sum(collective.bytes for collective in report.collectives)
    flops, nbytes = report.flops + phase.loop_remainder.flops, report.bytes_accessed + phase.loop_remainder.bytes
    step = step_time(chip, flops, nbytes, received)
    return dataclasses.replace(phase, compiled=report, compiled_step=step)


def _cost_model(config: ModelConfig, topology: Topology, workload: Workload, mesh: str) -> CostModel:
    sharding_ctx = abstract_sharding_context(MeshConfig.parse(mesh), topology.num_devices, workload)
    return CostModel.of(config, sharding_ctx, workload, compiler=topology.compiler)


def _fits(cost_model: CostModel, chip: Chip) -> bool:
    phases = cost_model.workload.phases
    return all(sum(cost_model.memory(phase).values()) <= chip.memory_bytes for phase in phases)


def _proposals(config: ModelConfig, topology: Topology, workload: Workload) -> list[MeshPlan]:
    """Return every mesh over all devices that divides the model: first those that fit, then by estimated time."""
    plans = []
    factors = _divisors(topology.num_devices)
    for fsdp, expert, tensor in itertools.product(factors, factors if config.moe else [1], factors):
        if topology.num_devices % (fsdp * expert * tensor) == 0:
            data = topology.num_devices // (fsdp * expert * tensor)
            sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
            mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
            try:
                plans.append(plan_mesh(config, topology, workload, mesh))
            except UsageError:
                continue  # the mesh does not divide the model or the batch
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_token or 0, plan.device_bytes))


def _legal_axis_sizes(config: ModelConfig, topology: Topology, workload: Workload, axis: str) -> Iterator[int]:
    for size in _divisors(topology.num_devices):
        try:
            plan_mesh(config, topology, workload, f"{axis}={size}")
        except UsageError:
            continue
        yield size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _largest_multiple(fits: Callable[[int], bool], multiple: int, limit: int) -> int | None:
    """Return the largest multiple up to the limit that fits, by bisection; None if the smallest does not fit."""
    low, high = 0, limit // multiple + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * multiple) else (low, middle)
    return low * multiple or None
