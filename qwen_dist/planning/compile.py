"""Compile a program without the hardware, and read its bytes, flops and collectives per device.

`libtpu` compiles for any TPU topology on a machine without a TPU. CPU devices are those of this process.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
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
from qwen_dist.engine.engine import CHUNK_SIZE
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
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.lora import attach_lora
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

# Installs the libtpu that belongs to this jax; `pip install libtpu` may install one whose programs it cannot read.
_INSTALL_LIBTPU = f"pip install 'jax[tpu]=={jax.__version__}'"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\})")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=\"(\d+)\"")
_COLLECTIVE = re.compile(rf"= (\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind: their number, and the bytes that one device receives in all of them."""

    kind: str
    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class CompilerReport:
    """What the compiler reports for one program, per device.

    Attributes:
      seconds: compile time.
      argument_bytes, temporary_bytes: as the compiler gives them, with the gaps between arrays.
      device_bytes: peak memory, arguments included. It may be less than arguments and temporaries together, because of
        the gaps.
      flops, bytes_accessed: XLA counts the body of a loop once; see `CostModel.loop_remainder`.
    """

    seconds: float
    argument_bytes: float
    temporary_bytes: float
    device_bytes: float
    flops: float
    bytes_accessed: float
    collectives: tuple[CollectiveTotal, ...]


def extrapolate(two: Sequence[CompilerReport], layers: Sequence[int], num_layers: int) -> CompilerReport:
    """Extrapolate two reports with fewer layers to `num_layers`, because every layer adds the same.

    `seconds` is the sum of the two.
    """
    shallow, deep = two

    def linear(low: float, high: float) -> float:
        if high < low:
            return high  # a decrease is not what a layer adds: the compiler treats a single layer differently
        return low + (high - low) * (num_layers - layers[0]) / (layers[1] - layers[0])

    numbers = {
        field.name: linear(getattr(shallow, field.name), getattr(deep, field.name))
        for field in dataclasses.fields(CompilerReport)
        if field.name not in ("collectives", "seconds")
    }
    # The peak of the deeper program may be at another point of it, which makes the slope too steep or too flat.
    least, most = numbers["argument_bytes"], numbers["argument_bytes"] + numbers["temporary_bytes"]
    numbers["device_bytes"] = min(max(numbers["device_bytes"], least), most)
    low, high = ({one.kind: one for one in compiled.collectives} for compiled in (shallow, deep))
    none = CollectiveTotal("", 0, 0)
    both = [(kind, low.get(kind, none), high.get(kind, none)) for kind in COLLECTIVES if kind in low | high]
    sums = tuple(CollectiveTotal(kind, linear(a.count, b.count), linear(a.bytes, b.bytes)) for kind, a, b in both)
    return CompilerReport(**numbers, seconds=shallow.seconds + deep.seconds, collectives=sums)


class DoesNotFit(UserError):
    """The compiler rejects the program because it needs too much memory. The message is the compiler's."""


def topology_mesh(topology: Topology, config: MeshConfig) -> jax.sharding.Mesh:
    """Return a mesh over the first devices of a topology, or over descriptions of them. Raises UserError."""
    devices = _devices(topology)
    sizes = config.sizes(len(devices))
    used = devices[: math.prod(sizes.values())]
    # A mesh axis may be part of an axis of the torus: tensor=8 on 4x4.
    array = mesh_utils.create_device_mesh(tuple(sizes.values()), used, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _devices(topology: Topology) -> Any:
    if topology.is_cpu:
        return jax.devices("cpu")[: topology.num_devices]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without a TPU no metadata server answers
    # On a v4 the two cores of a chip are one device, which is the default at run time.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except (RuntimeError, ValueError, ImportError) as error:
        hint = f"this needs libtpu: {_INSTALL_LIBTPU}"
        if "lockfile" in str(error):
            hint = "another process uses libtpu: wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        raise UserError(f"no devices for {topology.name}: {' '.join(str(error).split())[:300]} ({hint})") from None


def lower(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload, phase: Phase) -> jax.stages.Lowered:
    """Lower the program of one phase, exactly as it would run, for abstract parameters."""
    if phase == "train":
        return _lower_training(config, sharding_ctx, workload)
    module = Transformer(config, dtype=workload.dtype)
    if workload.quantization is not None:
        workload.quantization.declare(module)
    model = LoadedModel(config, module, abstract_parameters(module, sharding_ctx), sharding_ctx)  # type: ignore[arg-type]
    runner = Runner(model, workload.batch, cache_dtype=workload.cache_dtype)
    of_sequence = workload.pages(runner.specs, sharding_ctx)
    num_pages = tuple(workload.batch // runner.num_shards * number for number in of_sequence)
    if phase == "decode":
        return runner.lower_decode(num_pages)
    num_rows, _ = workload.tokens_of(phase, runner.num_shards)
    return runner.lower_prefill(num_pages, num_rows, CHUNK_SIZE, of_sequence)


def compile_program(lowered: jax.stages.Lowered) -> CompilerReport:
    """Compile a program and return the compiler's report. Raises DoesNotFit, and UserError if libtpu is of another jax."""
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
    return CompilerReport(
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        device_bytes=_peak(compiled, memory),
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        collectives=count_collectives(_text_of(compiled)),
    )


def _text_of(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        found = f"jax {jax.__version__} cannot read what libtpu {importlib.metadata.version('libtpu')} compiled"
        reason = str(error).partition("\n")[0]
        raise UserError(f"{found}; install the libtpu of this jax: {_INSTALL_LIBTPU} ({reason})") from None


def _peak(compiled: jax.stages.Compiled, memory: Any) -> float:
    """Return the peak memory in bytes, also where the reported peak leaves temporaries out."""
    devices = jax.tree.leaves(compiled.output_shardings)[0].device_set
    if any(device.platform == "cpu" for device in devices):
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments are outputs too
        return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes


def count_collectives(text: str) -> tuple[CollectiveTotal, ...]:
    """Return the totals of the collectives in the text of a compiled program, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in COLLECTIVES}
    for one in parse_collectives(text):
        found[one.kind].append(one.bytes)
    return tuple(CollectiveTotal(kind, len(sizes), sum(sizes)) for kind, sizes in found.items() if sizes)


@dataclasses.dataclass(frozen=True)
class CollectiveOp:
    """One collective operation.

    Attributes:
      kind: one of COLLECTIVES.
      arrays: its results as (elements, bits per element).
      group_size: how many devices exchange with each other.
    """

    kind: str
    arrays: tuple[tuple[int, int], ...]
    group_size: int

    @property
    def bytes(self) -> float:
        """Bytes that a device receives at least: an all-reduce is a reduce-scatter followed by an all-gather."""
        whole = sum(elements * bits for elements, bits in self.arrays) / 8
        others = self.group_size - 1
        return whole * {
            "all-reduce": 2 * others / self.group_size,
            "reduce-scatter": others,
            "collective-permute": 1,
        }.get(self.kind, others / self.group_size)


def parse_collectives(text: str) -> Iterator[CollectiveOp]:
    """Yield every collective in the text of a compiled program.

    A reduce-scatter may be written as a computation of that name with an all-reduce inside. A collective that overlaps
    several computations appears once in each of them; these copies have the same chain id.
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
            arrays = [max(arrays)]  # of operand, result and context
        group = _group_size(line)
        if is_scattered:
            kind, arrays = "reduce-scatter", [(elements // group, bits) for elements, bits in arrays]
        yield CollectiveOp(kind, tuple(arrays), group)


def _group_size(line: str) -> int:
    """Return how many devices exchange with each other.

    The text has one of the forms [number,size]<=…, {{0,1,…},…} and mesh['a'=2,'b'=4] {'b'}. In the last one the order of
    the devices may come before the axes.
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
    # An axis may be split: 'a':(1)2 is a part of size 2.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _lower_training(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload) -> jax.stages.Lowered:
    """Lower a training step with the default optimiser and master weights."""
    kept = accum_dtype(jnp.dtype(workload.dtype))
    if workload.lora is None:
        module, names = Transformer(config, dtype=kept), None
    else:
        module = Transformer(config, dtype=workload.dtype)
        if workload.quantization is not None:
            workload.quantization.declare(module)
        names = attach_lora(module, workload.lora, dtype=kept)
    model = LoadedModel(config, module, abstract_parameters(module, sharding_ctx), sharding_ctx)  # type: ignore[arg-type]
    options = OptimizerOptions(learning_rate=1e-5)
    schedule = make_schedule(options, 1)
    shapes = {name: model.parameters[name].shape for name in names or model.parameters}
    optimizer = make_optimizer(options, schedule, shapes, disk_shapes(module))
    trainer = Trainer(model, shapes.keys(), optimizer, schedule, dtype=workload.dtype, remat=workload.remat)
    tokens = jax.ShapeDtypeStruct((workload.batch, workload.context), np.int32)
    return trainer.lower(TrainBatch(tokens, tokens, tokens, tokens), 1)
