"""The real compiler's word on a program, without the hardware: bytes, flops and collectives of each device.

`libtpu` compiles for any TPU topology on a machine that has none; CPU devices are those of this process.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import OptimizerOptions
from qwen_dist.engine.engine import BLOCK
from qwen_dist.engine.runner import Runner
from qwen_dist.errors import UserError
from qwen_dist.mesh import AXES, MeshConfig
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.batches import Batch
from qwen_dist.train.lora import attach
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\})")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_COLLECTIVE = re.compile(rf"= (\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` operations of one kind; `bytes` is what one device receives from the others in all of them."""

    kind: str
    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler reports of one program, for each device. `seconds` is how long it took.

    `device_bytes` is the most that is in memory at once, arguments included. It may be less than arguments and temporaries
    together: these the compiler gives with the gaps between them.
    `flops` and `bytes_accessed` count a loop's body once, as XLA does: see `Arithmetic.repeated`.
    """

    seconds: float
    argument_bytes: float
    temporary_bytes: float
    device_bytes: float
    flops: float
    bytes_accessed: float
    collectives: tuple[Collective, ...]


def extrapolate(two: Sequence[Compiled], layers: Sequence[int], num_layers: int) -> Compiled:
    """What a program of `num_layers` layers would be, from two of fewer: each layer adds the same of everything.

    But for `seconds`, which are what these two took.
    """
    shallow, deep = two

    def line(low: float, high: float) -> float:
        if high < low:
            return high  # the compiler does otherwise with a single layer; it is not what a layer adds
        return low + (high - low) * (num_layers - layers[0]) / (layers[1] - layers[0])

    numbers = {
        field.name: line(getattr(shallow, field.name), getattr(deep, field.name))
        for field in dataclasses.fields(Compiled)
        if field.name not in ("collectives", "seconds")
    }
    # The largest moment of the deeper program may be another one, and the line of peaks too steep, or too flat.
    least, most = numbers["argument_bytes"], numbers["argument_bytes"] + numbers["temporary_bytes"]
    numbers["device_bytes"] = min(max(numbers["device_bytes"], least), most)
    low, high = ({one.kind: one for one in compiled.collectives} for compiled in (shallow, deep))
    none = Collective("", 0, 0)
    both = [(kind, low.get(kind, none), high.get(kind, none)) for kind in COLLECTIVES if kind in low | high]
    sums = tuple(Collective(kind, line(a.count, b.count), line(a.bytes, b.bytes)) for kind, a, b in both)
    return Compiled(**numbers, seconds=shallow.seconds + deep.seconds, collectives=sums)


class DoesNotFit(UserError):
    """The compiler refuses the program for its size; the message is the compiler's."""


def topology_mesh(topology: Topology, config: MeshConfig) -> jax.sharding.Mesh:
    """A mesh over the first devices of a topology, or over descriptions of them. Raises UserError."""
    devices = _devices(topology)
    sizes = config.sizes(len(devices))
    used = devices[: math.prod(sizes.values())]
    # A mesh axis may be part of an axis of the torus: tensor=8 on 4x4.
    array = mesh_utils.create_device_mesh(tuple(sizes.values()), used, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _devices(topology: Topology) -> Any:
    if topology.is_cpu:
        return jax.devices("cpu")[: topology.num_devices]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server tells of a TPU that is not there
    # On a v4 the two cores of a chip are one device, as they are by default when it runs.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except (RuntimeError, ValueError, ImportError) as error:
        hint = "this needs libtpu: pip install libtpu"
        if "lockfile" in str(error):
            hint = "another process uses libtpu: wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        raise UserError(f"no devices for {topology.name}: {' '.join(str(error).split())[:300]} ({hint})") from None


def lower(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload, phase: Phase) -> jax.stages.Lowered:
    """The program of one phase, exactly as it would run, for parameters that are not there."""
    if phase == "train":
        return _lower_training(config, sharding_ctx, workload)
    module = Transformer(config, dtype=workload.dtype)
    model = LoadedModel(config, module, abstract_parameters(module, sharding_ctx), sharding_ctx)  # type: ignore[arg-type]
    runner = Runner(model, workload.batch)
    of_row = tuple(workload.pages(config.windows).values())
    num_pages = tuple(workload.batch // runner.parts * number for number in of_row)
    if phase == "decode":
        return runner.lower_step(num_pages)
    num_blocks, _ = workload.tokens_of(phase, runner.parts)
    return runner.lower_read(num_pages, num_blocks, BLOCK, of_row)


def compile_program(lowered: jax.stages.Lowered) -> Compiled:
    """Compile, and read what the compiler says. Raises DoesNotFit."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).partition("\n")[0]) from None
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None
    return Compiled(
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        device_bytes=_peak(compiled, memory),
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        collectives=count_collectives(compiled.as_text() or ""),
    )


def _peak(compiled: jax.stages.Compiled, memory: Any) -> float:
    """The most that is in memory at once. The CPU's compiler leaves temporaries out of what it calls so."""
    devices = jax.tree.leaves(compiled.output_shardings)[0].device_set
    if any(device.platform == "cpu" for device in devices):
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments are outputs too
        return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def count_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program's text, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in COLLECTIVES}
    for one in collectives(text):
        found[one.kind].append(one.bytes)
    return tuple(Collective(kind, len(sizes), sum(sizes)) for kind, sizes in found.items() if sizes)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one collective makes: arrays as (elements, bits of each), by groups of so many devices."""

    kind: str
    arrays: tuple[tuple[int, int], ...]
    group: int

    @property
    def bytes(self) -> float:
        """What a device receives, in the fewest exchanges: a sum is scattered and then gathered."""
        whole = sum(elements * bits for elements, bits in self.arrays) / 8
        others = self.group - 1
        return whole * {
            "all-reduce": 2 * others / self.group,
            "reduce-scatter": others,
            "collective-permute": 1,
        }.get(self.kind, others / self.group)


def collectives(text: str) -> Iterator[Result]:
    """Every collective in a compiled program's text.

    The TPU's compiler writes a reduce-scatter as a computation of that name, in which a sum is cut, and a collective that
    goes on beside several computations once in each of them: a chain.
    """
    is_scattered = False
    chains = set()
    for line in text.splitlines():
        if line.endswith("{"):
            is_scattered = line.startswith("%all-reduce-scatter")
        if (match := _COLLECTIVE.search(line)) is None:
            continue
        if chain := _CHAIN.search(line):
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())
        result, kind, is_started = match.groups()
        arrays = [
            (math.prod(int(size) for size in dims.split(",") if size), int(bits or 8))
            for _, bits, dims in _SHAPE.findall(result)
        ]
        if is_started and kind in ("all-gather", "collective-permute"):
            arrays = [max(arrays)]  # of operand, result and what the two ends tell each other
        group = _group_size(line)
        if is_scattered:
            kind, arrays = "reduce-scatter", [(elements // group, bits) for elements, bits in arrays]
        yield Result(kind, tuple(arrays), group)


def _group_size(line: str) -> int:
    """How many devices exchange with each other: [number,size]<=…, {{0,1,…},…} or mesh['a'=2,'b'=4] {'b'}.

    The last may have the order of the devices before its axes.
    """
    match = _GROUPS.search(line)
    if match is None:
        return 1  # a collective-permute names pairs
    size, listed, mesh, axes = match.groups()
    if size:
        return int(size)
    if listed:
        return listed.count(",") + 1
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    # An axis may be there in part: 'a':(1)2 is 2 of it.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _lower_training(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload) -> jax.stages.Lowered:
    """A step with the default optimiser: master weights of what is trained, gradient, and all that the step changes."""
    kept = accum_dtype(jnp.dtype(workload.dtype))
    if workload.lora is None:
        module, names = Transformer(config, dtype=kept), None
    else:
        module = Transformer(config, dtype=workload.dtype)
        names = attach(module, workload.lora, dtype=kept)
    model = LoadedModel(config, module, abstract_parameters(module, sharding_ctx), sharding_ctx)  # type: ignore[arg-type]
    options = OptimizerOptions()
    schedule = make_schedule(options, options.warmup_steps + 1)
    shapes = {name: model.parameters[name].shape for name in names or model.parameters}
    optimizer = make_optimizer(options, schedule, shapes, disk_shapes(module))
    trainer = Trainer(model, shapes.keys(), optimizer, schedule, dtype=workload.dtype, remat=workload.remat)
    tokens = jax.ShapeDtypeStruct((workload.batch, workload.context), np.int32)
    return trainer.lower(Batch(tokens, tokens, tokens, tokens), 1)
