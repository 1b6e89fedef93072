"""What a model needs on a number of devices: does it fit, how large may the batch be, how long is a step, which mesh."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qwen_dist.errors import UsageError
from qwen_dist.mesh import MeshConfig
from qwen_dist.models.config import ModelConfig
from qwen_dist.planning.chips import Chip, Topology
from qwen_dist.planning.memory import Arithmetic, Cost, abstract_sharding_context
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext

if TYPE_CHECKING:
    from qwen_dist.planning.compile import Compiled

NUM_PROPOSALS = 5
LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds that one step takes: `compute` at the chip's peak, `memory` at its bandwidth, `collectives` over the ICI.

    Compute and memory overlap; that collectives hide behind them is not assumed.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.collectives


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One program. memory: bytes on each device by kind. step: by arithmetic; without its collectives, the floor.

    repeated: what of `cost` is in turns of loops that a compiler does not count. compiled: its word, if asked for, and the
    step from both; or `refused`, why it would not compile.
    """

    phase: Phase
    memory: dict[str, int]
    cost: Cost
    repeated: Cost
    step: StepTime | None
    compiled: Compiled | None = None
    compiled_step: StepTime | None = None
    refused: str = ""

    @property
    def device_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def needed_bytes(self) -> float:
        """The larger of the arithmetic's and the compiler's word."""
        return max(self.device_bytes, self.compiled.device_bytes if self.compiled else 0)


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A workload on one mesh; its batch is the one asked for, rounded up to what the mesh can split."""

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
        """Of the phase that takes most of the time: a decode step is a token a row, a training step all of its tokens."""
        step, workload = self.phases[-1].step, self.workload
        tokens = workload.batch * (workload.context if workload.verb == "finetune" else 1)
        return None if step is None else step.total / tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything `qwen-dist plan` says. largest_*: None when nothing fits; divisors: sizes each axis may have alone."""

    model: str
    topology: Topology
    chosen: MeshPlan
    proposals: tuple[MeshPlan, ...]
    largest_batch: int | None
    largest_context: int | None
    divisors: dict[str, tuple[int, ...]]
    compiled_layers: tuple[int, ...] = ()


def make_plan(name: str, config: ModelConfig, topology: Topology, workload: Workload, mesh: str | None) -> Plan:
    """Plan by arithmetic; without a mesh the best one found is taken.

    Raises:
      UsageError: the mesh, the model and the batch do not go together, or no mesh goes with them.
    """
    proposals = () if mesh is not None else tuple(_proposals(config, topology, workload)[:NUM_PROPOSALS])
    if mesh is None and not proposals:
        raise UsageError(f"no mesh of {topology.num_devices} devices divides the model and the batch")
    chosen = proposals[0] if mesh is None else plan_mesh(config, topology, workload, mesh)
    arithmetic = _arithmetic(config, topology, chosen.workload, chosen.mesh)
    axes = ("fsdp", "expert", "tensor") if config.moe else ("fsdp", "tensor")
    planned, multiple = chosen.workload, arithmetic.sharding_ctx.batch_multiple()

    def fits_with(workload: Workload) -> bool:
        return _fits(dataclasses.replace(arithmetic, workload=workload), topology.chip)

    return Plan(
        model=name,
        topology=topology,
        chosen=chosen,
        proposals=proposals,
        largest_batch=_largest(lambda rows: fits_with(dataclasses.replace(planned, batch=rows)), multiple, LARGEST),
        largest_context=_largest(
            lambda tokens: fits_with(dataclasses.replace(planned, context=tokens)), 64, config.max_position_embeddings
        ),
        divisors={axis: tuple(_divisors(config, topology, workload, axis)) for axis in axes},
    )


def with_compiled(plan: Plan, config: ModelConfig, layers: tuple[int, ...]) -> Plan:
    """The plan with the compiler's word on each program, of the whole model or extrapolated from two numbers of layers.

    Raises UserError when the topology's compiler is not here.
    """
    from qwen_dist.planning.compile import topology_mesh

    workload = plan.chosen.workload
    sharding_ctx = ShardingContext(topology_mesh(plan.topology, MeshConfig.parse(plan.chosen.mesh)), workload.rules)
    phases = tuple(_compile_phase(phase, config, sharding_ctx, plan, layers) for phase in plan.chosen.phases)
    fits = all(not phase.refused and phase.needed_bytes <= plan.topology.chip.memory_bytes for phase in phases)
    chosen = dataclasses.replace(plan.chosen, phases=phases, fits=fits)
    return dataclasses.replace(plan, chosen=chosen, compiled_layers=layers or (len(config.layers),))


def compiled_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Read `all`, or two numbers of layers such as `3,5` to extrapolate from. Raises UsageError."""
    if text == "all":
        return ()
    layers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(layers) != 2 or not 0 < layers[0] < layers[1] <= num_layers:
        raise UsageError(f"--compile {text}: give two rising numbers up to {num_layers}, such as 3,5, or none")
    return layers


def plan_mesh(config: ModelConfig, topology: Topology, workload: Workload, mesh: str) -> MeshPlan:
    """Plan one mesh by arithmetic. Raises UsageError when it does not fit the devices or the model."""
    multiple = abstract_sharding_context(MeshConfig.parse(mesh), topology.num_devices, workload).batch_multiple()
    workload = dataclasses.replace(workload, batch=-(-workload.batch // multiple) * multiple)
    arithmetic = _arithmetic(config, topology, workload, mesh)
    phases = tuple(_phase(arithmetic, phase, topology.chip) for phase in workload.phases)
    return MeshPlan(mesh, workload, arithmetic.num_parameters, phases, _fits(arithmetic, topology.chip))


def _phase(arithmetic: Arithmetic, phase: Phase, chip: Chip) -> PhasePlan:
    cost = arithmetic.cost(phase)
    step = step_time(chip, cost.flops, cost.bytes, sum(cost.collectives.values()))
    return PhasePlan(phase, arithmetic.memory(phase), cost, arithmetic.repeated(phase), step)


def step_time(chip: Chip, flops: float, nbytes: float, exchanged: float) -> StepTime | None:
    """None for a chip without a data sheet."""
    if chip.flops_per_second is None or chip.bytes_per_second is None or chip.ici_bytes_per_second is None:
        return None
    return StepTime(flops / chip.flops_per_second, nbytes / chip.bytes_per_second, exchanged / chip.ici_bytes_per_second)


def _compile_phase(
    plan: PhasePlan, config: ModelConfig, sharding_ctx: ShardingContext, whole: Plan, layers: tuple[int, ...]
) -> PhasePlan:
    from qwen_dist.planning.compile import DoesNotFit, compile_program, extrapolate, lower

    workload, chip = whole.chosen.workload, whole.topology.chip
    depths = [dataclasses.replace(config, layers=config.layers[:depth]) for depth in layers] or [config]
    try:
        compiled = [compile_program(lower(depth, sharding_ctx, workload, plan.phase)) for depth in depths]
    except DoesNotFit as error:
        return dataclasses.replace(plan, refused=str(error))
    one = compiled[0] if len(compiled) == 1 else extrapolate(compiled, layers, len(config.layers))
    exchanged = sum(collective.bytes for collective in one.collectives)
    step = step_time(chip, one.flops + plan.repeated.flops, one.bytes_accessed + plan.repeated.bytes, exchanged)
    return dataclasses.replace(plan, compiled=one, compiled_step=step)


def _arithmetic(config: ModelConfig, topology: Topology, workload: Workload, mesh: str) -> Arithmetic:
    sharding_ctx = abstract_sharding_context(MeshConfig.parse(mesh), topology.num_devices, workload)
    return Arithmetic.of(config, sharding_ctx, workload, is_tpu=not topology.is_cpu)


def _fits(arithmetic: Arithmetic, chip: Chip) -> bool:
    phases = arithmetic.workload.phases
    return all(sum(arithmetic.memory(phase).values()) <= chip.memory_bytes for phase in phases)


def _proposals(config: ModelConfig, topology: Topology, workload: Workload) -> list[MeshPlan]:
    """Every mesh over all devices that divides the model: what fits first, then the fastest by arithmetic."""
    plans = []
    factors = _factors(topology.num_devices)
    for fsdp, expert, tensor in itertools.product(factors, factors if config.moe else [1], factors):
        if topology.num_devices % (fsdp * expert * tensor) == 0:
            data = topology.num_devices // (fsdp * expert * tensor)
            sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
            mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
            try:
                plans.append(plan_mesh(config, topology, workload, mesh))
            except UsageError:
                continue  # a size that does not divide is no proposal
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_token or 0, plan.device_bytes))


def _divisors(config: ModelConfig, topology: Topology, workload: Workload, axis: str) -> Iterator[int]:
    for size in _factors(topology.num_devices):
        try:
            plan_mesh(config, topology, workload, f"{axis}={size}")
        except UsageError:
            continue
        yield size


def _factors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _largest(fits: Callable[[int], bool], multiple: int, limit: int) -> int | None:
    """The largest multiple up to the limit that fits, where more never fits better; None if the smallest does not."""
    low, high = 0, limit // multiple + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * multiple) else (low, middle)
    return low * multiple or None
