"""Estimate the steps of four models on each kind of TPU, and let the compiler count the bytes of decode; no TPU needed.

    python benchmarks/tpu.py                                        one table of estimates, in seconds
    python benchmarks/tpu.py --bytes v5e:2x2,v6e:2x2 [--layers 3,5] what a decode step of Qwen3-8B moves, by operation
    python benchmarks/tpu.py --overlap v5e:4x4 [--layers 3]         collectives of a training step that overlap with it

The estimate is that of `qwen-dist plan`: `max(flops / peak, bytes / bandwidth) + received bytes / ICI`, on the best mesh
that plan finds. The bytes are those of the compiled program's operations in the chip's main memory (HBM): arrays that stay
in the on-chip memory are left out, what is written in place counts as what is written, and a loop counts as often as it
runs for rows that are full. The floor is weights and live cache. --bytes and --overlap need libtpu (extra `tpu`).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from qwen_dist.config import LoraOptions
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.plan import make_capacity_plan
from qwen_dist.planning.workload import Workload
from qwen_dist.runtime.backend import start_jax


def qwen3(layers: int, hidden: int, heads: int, mlp: int, **values: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
    } | values


_EXPERTS = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_EXPERTS |= {"num_key_value_heads": 4}
MODELS = {
    "Qwen3-8B": qwen3(36, 4096, 32, 12_288),
    "Qwen3-32B": qwen3(64, 5120, 64, 25_600),
    "Qwen3-30B-A3B": qwen3(48, 2048, 32, 6144, **_EXPERTS, moe_intermediate_size=768),
    "Qwen3-235B-A22B": qwen3(94, 4096, 64, 12_288, **_EXPERTS, moe_intermediate_size=1536),
}
# Chips for each model, by generation.
TOPOLOGIES = {
    "Qwen3-8B": ("v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:1x1x1"),
    "Qwen3-32B": ("v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"),
    "Qwen3-30B-A3B": ("v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"),
    "Qwen3-235B-A22B": ("v5e:8x8", "v5p:4x4x4", "v6e:4x8", "tpu7x:2x2x4"),
}
BATCH, CONTEXT = 64, 4096
# Options of libtpu with which MaxText trains. They are no setting of this project: libtpu 0.0.42 makes the same schedule.
OVERLAP = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", metavar="TOPOLOGIES", help="separated by commas")
    parser.add_argument("--overlap", metavar="TOPOLOGY")
    parser.add_argument("--layers", default="3,5", help="of the model that is compiled; the last is shown by operation")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    start_jax(1, "bfloat16", use_compilation_cache=False)
    layers = list(map(int, options.layers.split(",")))
    if options.bytes:
        for topology in options.bytes.split(","):
            print_bytes(topology, layers, options.batch, options.context)
    elif options.overlap:
        print_overlap(options.overlap, layers[-1])
    else:
        print_estimates()


def print_estimates() -> None:
    """Print the table of estimated steps."""
    print(f"{BATCH} sequences of {CONTEXT} tokens; LoRA: {BATCH} rows of {CONTEXT}; milliseconds: estimate (floor)\n")
    print("| model | chips | mesh | decode | tokens/s | prefill, a step | LoRA step |\n|---|---|---|---|---|---|---|")
    for model, values in MODELS.items():
        for name in TOPOLOGIES[model]:
            topology, config = Topology.parse(name), parse_model_config(values)
            inference = make_capacity_plan(model, config, topology, Workload("batch", BATCH, CONTEXT), None)
            training = make_capacity_plan(
                model, config, topology, Workload("finetune", BATCH, CONTEXT, lora=LoraOptions()), None
            )
            steps = {phase.phase: phase.step for plan in (inference, training) for phase in plan.chosen.phases}
            cells = [shown(steps[phase]) for phase in ("decode", "prefill", "train")]
            rate = inference.chosen.workload.batch / steps["decode"].total
            fits = "" if inference.chosen.fits else " (does not fit)"
            trained = f"{cells[2]}{'' if training.chosen.fits else ' (does not fit)'}, {training.chosen.mesh}"
            mesh = f"{inference.chosen.mesh or 'data=1'}{fits}"
            print(f"| {model} | {name} | {mesh} | {cells[0]} | {rate:,.0f} | {cells[1]} | {trained} |")


def shown(step: Any) -> str:
    return f"{1e3 * step.total:.3g} ({1e3 * max(step.compute, step.memory):.3g})"


# --- bytes ---


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program: its name, kind, results, operands and the text of its line."""

    name: str
    kind: str
    results: tuple[tuple[int, bool], ...]
    operands: tuple[str, ...]
    line: str


_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)(?= [\w-]+\()|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
# What moves nothing, or is counted where its parts are.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done", "iota", "conditional"}
_FREE |= {"partition-id", "replica-id", "after-all", "while", "all-gather-done", "all-reduce-done", "async-done", "call"}


def operations(text: str) -> Iterator[tuple[str, Operation]]:
    """Yield the operations of a compiled program with the name of their computation."""
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
        elif match := _LINE.match(line):
            name, results, kind, rest = match.groups()
            arrays = tuple(
                (math.prod(int(size) for size in dims.split(",") if size) * int(bits or 8) // 8, "S(" not in (layout or ""))
                for _, bits, dims, layout in _ARRAY.findall(results)
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            yield computation, Operation(name, kind, arrays, operands, line)


def moved_bytes(text: str, iterations: int) -> collections.Counter[str]:
    """Return the bytes that the operations of a compiled program move in main memory, by what they are.

    Args:
      text: of the compiled program.
      iterations: how often the loops of attention run.
    """
    by_computation: dict[str, dict[str, Operation]] = collections.defaultdict(dict)
    for computation, operation in operations(text):
        by_computation[computation][operation.name] = operation
    total: collections.Counter[str] = collections.Counter()

    def add(computation: str, times: int) -> None:
        inside = by_computation[computation]
        for operation in inside.values():
            if operation.kind == "while":
                body = re.search(r"body=%([\w.\-]+)", operation.line)
                assert body is not None
                add(body[1], times * iterations)
            elif operation.kind not in _FREE:
                total[_label(operation)] += times * _bytes_of(operation, inside, by_computation)

    add("ENTRY", 1)
    return total


def _bytes_of(operation: Operation, inside: dict[str, Operation], computations: dict[str, dict[str, Operation]]) -> int:
    """Return what an operation reads and writes in main memory."""
    written = [size for size, is_main in operation.results if is_main]
    if operation.kind in ("copy-start", "slice-start"):
        # Results: the copy, the original and a context. One side is in main memory, or both.
        sizes = [(size, is_main) for size, is_main in operation.results if size > 4]
        least = min(size for size, _ in sizes)
        return sum(least for _, is_main in sizes if is_main)
    read = [
        size
        for name in operation.operands
        if name in inside and len(inside[name].results) == 1
        for size, is_main in inside[name].results
        if is_main
    ]
    called = re.search(r"calls=%([\w.\-]+)", operation.line)
    kinds = {one.kind for one in computations[called[1]].values()} if called else {operation.kind}
    if kinds & {"scatter", "dynamic-update-slice"} and written and max(written) in read:
        # In place: what is written is at most what the other operands bring.
        read.remove(max(written))
        return 2 * sum(read)
    if kinds & {"gather", "dynamic-slice"} and read and sum(operation_sizes(operation)) < max(read):
        read.remove(max(read))
        read.append(sum(operation_sizes(operation)))
    return sum(read) + sum(written)


def operation_sizes(operation: Operation) -> list[int]:
    return [size for size, _ in operation.results]


def _label(operation: Operation) -> str:
    """Return the part of the model that an operation belongs to, by its metadata, and its kind."""
    found = re.search(r'op_name="([^"]*)"', operation.line)
    name = re.sub(r"layers[.\[]\d+\]?|states\[\d+\]", "layer", found[1] if found else "prefetch or copy of the compiler")
    parts = [part for part in re.split(r"[/]", name) if not part.startswith(("jit(", "vmap(", "while", "body", "closed"))]
    return f"{'/'.join(parts[-3:])} ({operation.kind})"


def print_bytes(name: str, layers: list[int], batch: int, context: int) -> None:
    """Print what a decode step of Qwen3-8B moves on each chip, compared with weights and live cache."""
    from qwen_dist.ops.paged_cache import PAGE, entries_at_a_time
    from qwen_dist.planning.compile import lower, topology_mesh
    from qwen_dist.sharding import ShardingContext

    topology = Topology.parse(name)
    workload = Workload("batch", batch, context)
    sharding_ctx = ShardingContext(topology_mesh(topology, MeshConfig(tensor=topology.num_devices)), workload.rules)
    iterations = batch * context // PAGE // entries_at_a_time(batch, 1)
    floors, totals = [], []
    for depth in layers:
        config = parse_model_config(MODELS["Qwen3-8B"] | {"num_hidden_layers": depth})
        lowered = lower(config, sharding_ctx, workload, "decode")
        compiled = lowered.compile()
        counted = moved_bytes(compiled.as_text() or "", iterations)
        plan = make_capacity_plan("", config, topology, workload, f"tensor={topology.num_devices}")
        # Of the embedding a step reads a few rows.
        embedding = 2 * config.vocab_size * config.hidden_size // topology.num_devices
        floors.append(next(phase.cost.bytes for phase in plan.chosen.phases if phase.phase == "decode") - embedding)
        totals.append(sum(counted.values()))
    print(f"{name}, tensor={topology.num_devices}, {batch} sequences of {context}: GB on each chip")
    for depth, floor, total in zip(layers, floors, totals, strict=True):
        of_both = f"moved {total / 1e9:.3f}, weights and live cache {floor / 1e9:.3f}"
        print(f"  {depth} layers: {of_both}, ratio {total / floor:.2f}")
    if len(layers) > 1:
        of_layer = [(x[-1] - x[0]) / (layers[-1] - layers[0]) for x in (totals, floors)]
        all_layers = MODELS["Qwen3-8B"]["num_hidden_layers"]
        whole = [x[0] + one * (all_layers - layers[0]) for x, one in zip((totals, floors), of_layer, strict=True)]
        sums = f"{whole[0] / 1e9:.2f} / {whole[1] / 1e9:.2f} = {whole[0] / whole[1]:.2f}"
        print(f"  a layer: ratio {of_layer[0] / of_layer[1]:.2f}; all {all_layers}: {sums}")
    for label, size in counted.most_common(14):
        print(f"  {size / 1e6:10.1f} MB  {label}")


# --- overlap ---


def print_overlap(name: str, depth: int) -> None:
    """Print how many collectives of a training step run during something else, without and with the options `OVERLAP`."""
    from qwen_dist.planning.compile import lower, topology_mesh
    from qwen_dist.sharding import ShardingContext
    from qwen_dist.train import step

    topology = Topology.parse(name)
    workload = Workload("finetune", topology.num_devices, 1024)
    sharding_ctx = ShardingContext(topology_mesh(topology, MeshConfig(fsdp=topology.num_devices)), workload.rules)
    # The blocks of Qwen3-8B; a small vocabulary, which compiles faster.
    config = parse_model_config(MODELS["Qwen3-8B"] | {"num_hidden_layers": depth, "vocab_size": 32_768})
    for title, options in (("without", None), ("with OVERLAP", dict.fromkeys(OVERLAP, True))):
        step.compiler_options = lambda *_, options=options: options
        text = lower(config, sharding_ctx, workload, "train").compile().as_text() or ""
        print(f"{title}: {describe_overlap(text)}", flush=True)


def describe_overlap(text: str) -> str:
    """Return how many collectives are in the schedule of a compiled program: those that start and end apart, and others."""
    counts: collections.Counter[str] = collections.Counter()
    for _, operation in operations(text):
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            if operation.kind == f"{kind}-start" or (operation.kind == "async-start" and kind in operation.line):
                counts[f"{kind}, asynchronous"] += 1
            elif operation.kind == kind:
                is_fused = "async_collective" in operation.line or "async-collective" in operation.line
                counts[f"{kind}, {'in the steps of a computation' if is_fused else 'alone'}"] += 1
    fused = len(set(re.findall(r"%(async_collective_fusion[\w.\-]*) \(", text)))
    return (
        ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
        + f"; {fused} fusions with a collective inside"
    )


if __name__ == "__main__":
    main()
