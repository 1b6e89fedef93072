"""Compile time of unrolled layers and of one scanned layer; one table, one run.

    python benchmarks/compile_time.py [--layers 28,64,94] [--phases decode,train] [--topology v5e:4x4] [--context 2048]

The blocks of Qwen3-32B are compiled ahead of time and not run: a decode step (`data=2,tensor=8`, 16 rows) and the
gradient of a training step (`fsdp=16`, one row per device, full remat). "unrolled" is the model itself; "scanned" runs
the same block in a `lax.scan` over stacked weights and caches. Memory is the compiler's figure for one device. A TPU
topology needs libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import abstract_parameters, with_parameters
from qwen_dist.models.rope import rope_table
from qwen_dist.models.state import MixerInputs, empty_states, state_axes
from qwen_dist.models.transformer import Block, Transformer, state_specs
from qwen_dist.ops.paged_cache import PageIndices, pages_for
from qwen_dist.ops.step_rows import StepIndices, StepRows, row_groups
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.compile import CompilerReport, compile_program, topology_mesh
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext, constrain, use_sharding
from qwen_dist.train.loss import next_token_loss

QWEN3_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
}
SETTINGS = {"decode": ("data=2,tensor=8", INFERENCE), "train": ("fsdp=16", TRAIN)}
ROWS = 16


class Scanned(Transformer):
    """The same model as one block, scanned over stacked parameters and caches."""

    def __init__(self, config: ModelConfig):
        super().__init__(dataclasses.replace(config, layers=config.layers[:1]), dtype="bfloat16")

    def __call__(self, tokens_BT, positions_BT, states=None, indices=None, *, segments_BT=None, remat=None):  # type: ignore[no-untyped-def,override]
        x_BTD = constrain(self.embed_tokens(tokens_BT), "batch", "length", "embed")
        rope = rope_table(self.config.rope, self.config.head_dim, positions_BT, x_BTD.dtype)
        inputs = MixerInputs(rope, positions_BT, segments_BT)
        if indices is not None:
            groups, page_BT = row_groups([StepRows(tokens_BT, positions_BT, indices)], 0, 1)
            inputs = inputs._replace(groups=groups, page_BT=page_BT)
        graph, stacked = nnx.split(self.layers[0])

        def run(x_BTD: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            state, layer_state = layer
            block: Block = nnx.merge(graph, state)
            x_BTD, layer_state, _ = block(x_BTD, inputs, layer_state)
            return x_BTD, layer_state

        if remat is not None:
            run = jax.checkpoint(run, policy=remat)
        x_BTD, updated = jax.lax.scan(run, x_BTD, (stacked, None if states is None else states[0]))
        return self.norm(x_BTD), None if states is None else (updated,), ()


def lower(phase: str, num_layers: int, is_scanned: bool, topology: Topology, context: int) -> jax.stages.Lowered:
    mesh, rules = SETTINGS[phase]
    config = parse_model_config(QWEN3_32B | {"num_hidden_layers": num_layers})
    sharding_ctx = ShardingContext(topology_mesh(topology, MeshConfig.parse(mesh)), rules)
    module = Scanned(config) if is_scanned else Transformer(config, dtype="bfloat16")
    parameters = abstract_parameters(module, sharding_ctx)
    if is_scanned:
        parameters = {k: stack(v, num_layers) if k.startswith("layers.") else v for k, v in parameters.items()}
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    if phase == "train":
        tokens = numbers((ROWS, context), sharding=sharding_ctx.activation("tokens", (ROWS, context), ("batch", "length")))
        step = jax.jit(functools.partial(gradient, module, sharding_ctx))
        return step.lower(parameters, tokens, tokens)
    num_shards = sharding_ctx.batch_multiple()
    num_pages = ROWS // num_shards * pages_for(context)
    specs = state_specs(module.config, "bfloat16")
    states = jax.eval_shape(lambda: empty_states(specs, num_shards, [num_pages], ROWS // num_shards))
    place = sharding_ctx.activation("layer state", states[0].k.shape, state_axes(specs[0])[0])
    states = jax.tree.map(lambda x: x.update(sharding=place), states)
    if is_scanned:
        states = jax.tree.map(lambda x: stack(x, num_layers), states)
    everywhere = functools.partial(numbers, sharding=sharding_ctx.replicated())
    entries, column, rows = everywhere((num_shards, num_pages)), everywhere((ROWS, 1)), everywhere((ROWS,))
    pages = PageIndices(column, rows, entries, entries, entries, everywhere(()))
    indices = StepIndices(rows, (pages,))
    step = jax.jit(functools.partial(decode, module, sharding_ctx), donate_argnums=1)
    return step.lower(parameters, states, column, column, indices)


def stack(leaf: jax.ShapeDtypeStruct, num_layers: int) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype, sharding=sharding.update(spec=spec))


def decode(module, sharding_ctx, parameters, states, tokens, positions, indices):  # type: ignore[no-untyped-def]
    with use_sharding(sharding_ctx):
        model = with_parameters(module, parameters)
        x_BTD, states, _ = model(tokens, positions, states, indices)
        return jnp.argmax(model.unembed(x_BTD), axis=-1), states


def gradient(module, sharding_ctx, parameters, tokens, positions):  # type: ignore[no-untyped-def]
    def loss(parameters: Any) -> jax.Array:
        model = with_parameters(module, parameters)
        x_BTD, _, _ = model(tokens, positions, remat=jax.checkpoint_policies.nothing_saveable)
        return next_token_loss(x_BTD, model.head(), tokens, jnp.ones(tokens.shape), sharding_ctx.batch_multiple())

    with use_sharding(sharding_ctx):
        return jax.grad(loss)(parameters)


def row(phase: str, num_layers: int, how: str, compiled: CompilerReport) -> list[str]:
    sizes = (compiled.argument_bytes, compiled.temporary_bytes)
    return [phase, str(num_layers), how, f"{compiled.seconds:.1f}", *(f"{size / 1e9:.2f}" for size in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="28,64,94", help="numbers of layers, separated by commas")
    parser.add_argument("--phases", default="decode,train", help="decode and train, separated by commas")
    parser.add_argument("--topology", default="v5e:4x4", help="a topology with 16 devices")
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    topology = Topology.parse(options.topology)
    if topology.num_devices != math.prod(MeshConfig.parse(SETTINGS["train"][0]).sizes(16).values()):
        parser.error(f"--topology {options.topology} has {topology.num_devices} devices; give one with 16")
    table = Table(box=box.SIMPLE)
    for name in ("phase", "layers", "as", "compile, s", "arguments, GB", "temporaries, GB"):
        table.add_column(name, justify="left" if name in ("phase", "as") else "right")
    for phase in options.phases.split(","):
        for num_layers in map(int, options.layers.split(",")):
            for how in ("unrolled", "scanned"):
                compiled = compile_program(lower(phase, num_layers, how == "scanned", topology, options.context))
                table.add_row(*row(phase, num_layers, how, compiled))
                print(f"{phase}, {num_layers} layers {how}: {compiled.seconds:.1f} s", file=sys.stderr, flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
