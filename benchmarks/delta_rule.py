"""The gated delta rule's gradient with each chunk prepared in the loop, and with all chunks prepared ahead of it.

    python benchmarks/delta_rule.py [--tokens 4096] [--heads 8,3] [--topology v5e:2x2]

One row of tokens, 128 channels, float32. With a topology one TPU's program is compiled, which needs libtpu; otherwise the
programs run on the first CPU device, in turn, and the best of five times counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from qwen_dist.mesh import MeshConfig
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule_plain, delta_rule_prepared
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.compile import topology_mesh

CHANNELS, ROUNDS = 128, 5
FORMS: dict[str, Callable[..., Any]] = {"in the loop": delta_rule_plain, "ahead": delta_rule_prepared}


def abstract_inputs(num_tokens: int, heads: tuple[int, int], sharding: Any) -> DeltaInputs:
    key_heads, values_per_head = heads
    row = (1, num_tokens, key_heads)
    shapes = [(*row, CHANNELS)] * 2 + [(*row, values_per_head, CHANNELS), *[(*row, values_per_head)] * 2]
    return DeltaInputs(*(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes))


def compile_gradient(form: Callable[..., Any], inputs: DeltaInputs) -> tuple[jax.stages.Compiled, float]:
    """Return the compiled program and the seconds of processor time that the compiler took."""
    lowered = jax.jit(jax.grad(lambda inputs: jnp.sum(form(inputs)[0] ** 2))).lower(inputs)
    start = time.process_time()
    return lowered.compile(), time.process_time() - start


def best_times(programs: dict[str, jax.stages.Compiled], inputs: DeltaInputs) -> dict[str, float]:
    rng = np.random.default_rng(0)
    q, k, v, g, beta = (jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in inputs)
    arrays, best = DeltaInputs(q, k, v, -jnp.abs(g), jax.nn.sigmoid(beta)), dict.fromkeys(programs, float("inf"))
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(arrays))
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", default="8,3", help="key heads, and value heads of each")
    parser.add_argument("--topology", help="compile for one chip of this TPU slice, and do not run")
    options = parser.parse_args()
    key_heads, values_per_head = map(int, options.heads.split(","))
    devices = jax.devices("cpu")[:1]
    if options.topology:
        devices = topology_mesh(Topology.parse(options.topology), MeshConfig.parse("data=1")).devices.flat[0:1]
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    inputs = abstract_inputs(options.tokens, (key_heads, values_per_head), sharding)
    found = {name: compile_gradient(form, inputs) for name, form in FORMS.items()}
    times = {} if options.topology else best_times({name: program for name, (program, _) in found.items()}, inputs)
    table = Table(box=box.SIMPLE)
    for name in ("chunks prepared", "compile, s of processor time", "temporaries, GB", "run, s"):
        table.add_column(name, justify="left" if name == "chunks prepared" else "right")
    for name, (program, seconds) in found.items():
        size = program.memory_analysis().temp_size_in_bytes
        table.add_row(name, f"{seconds:.1f}", f"{size / 1e9:.2f}", f"{times[name]:.2f}" if name in times else "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
