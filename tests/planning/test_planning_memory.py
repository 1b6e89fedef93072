"""The cost model of a plan against known counts, real arrays and the compiler."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from shapes import QWEN3_8B, QWEN3_32B, SMALL, qwen3

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions
from qwen_dist.engine.runner import Runner
from qwen_dist.errors import UsageError
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import random_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.compile import CollectiveTotal, CompilerReport, compile_program, extrapolate, lower, topology_mesh
from qwen_dist.planning.memory import CostModel, abstract_sharding_context
from qwen_dist.planning.workload import Workload
from qwen_dist.sharding import ShardingContext

CPU = Topology.parse("cpu:8")


def cost_model(hf, mesh: str, workload: Workload, num_devices: int = 8) -> CostModel:
    sharding_ctx = abstract_sharding_context(MeshConfig.parse(mesh), num_devices, workload)
    return CostModel.of(parse_model_config(hf), sharding_ctx, workload)


def compiled(hf, mesh: str, workload: Workload, phase: str):
    sharding_ctx = ShardingContext(topology_mesh(CPU, MeshConfig.parse(mesh)), workload.rules)
    return compile_program(lower(parse_model_config(hf), sharding_ctx, workload, phase))


def test_parameters_of_released_models():
    """The counts on their model cards."""
    workload = Workload("batch", 8, 1024)
    assert cost_model(QWEN3_8B, "", workload).num_parameters == 8_190_735_360
    assert cost_model(QWEN3_32B, "", workload).num_parameters == 32_762_123_264
    tied = qwen3(28, 1024, 16, 3072, tie_word_embeddings=True)
    assert cost_model(tied, "", workload).num_parameters == 596_049_920


@pytest.mark.parametrize(
    "mesh", ["tensor=8", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("", "data=2,fsdp=2,tensor=2", "fsdp=8"))]
)
def test_parameters_and_cache_match_real_arrays(mesh):
    """With and without a sliding window: both kinds of layers must be counted."""
    hf = SMALL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config, workload = parse_model_config(hf), Workload("batch", 8, 1000)
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), workload.rules)
    module = Transformer(config, dtype="bfloat16")
    model = LoadedModel(config, module, random_parameters(module, sharding_ctx), sharding_ctx)
    runner = Runner(model, workload.batch)
    # Pages for all positions of a row, and for a window: a chunk of a prompt and the 16 tokens before it.
    state = runner.start(tuple(workload.batch // runner.num_shards * pages for pages in (16, 10)))
    memory = cost_model(hf, mesh, workload).memory("decode")
    assert memory["parameters"] == on_first_device(model.parameters)
    assert memory["cache"] == on_first_device(state.states)
    assert memory["sampling"] == on_first_device(state.token_presence_MV)


def on_first_device(tree) -> int:
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "phase"),
    [
        pytest.param("data=2,fsdp=2,tensor=2", "prefill", marks=pytest.mark.slow),
        pytest.param("tensor=8", "prefill", marks=pytest.mark.slow),
        ("data=4,tensor=2", "decode"),
    ],
)
def test_inference_memory_is_within_10_percent_of_the_compiler(mesh, phase):
    """Flops are not compared: the compiler's include the sampler, and only one iteration of attention's loop over pages."""
    workload = Workload("batch", 8, 256)
    plan, real = cost_model(SMALL, mesh, workload), compiled(SMALL, mesh, workload, phase)
    assert sum(plan.memory(phase).values()) == pytest.approx(real.device_bytes, rel=0.1)


def test_prefill_computes_one_token_per_row_in_the_last_block():
    """It computes keys and values of all tokens. With a single block this is most of the work."""
    one_block, mesh, workload = SMALL | {"num_hidden_layers": 1}, "data=4,tensor=2", Workload("batch", 8, 256)
    plan, real = cost_model(one_block, mesh, workload), compiled(one_block, mesh, workload, "prefill")
    assert plan.cost("prefill").flops == pytest.approx(real.flops + plan.loop_remainder("prefill").flops, rel=0.05)


def test_optimizer_state_is_float32_with_master_weights_of_narrow_parameters():
    narrow = cost_model(SMALL, "fsdp=8", Workload("finetune", 8, 128)).memory("train")
    wide = cost_model(SMALL, "fsdp=8", Workload("finetune", 8, 128, dtype="float32")).memory("train")
    assert narrow["optimizer"] == narrow["parameters"] // 2 * 4 * 3
    assert wide["optimizer"] == wide["parameters"] * 2
    assert wide["gradients"] == narrow["gradients"] == wide["parameters"] == 2 * narrow["parameters"]


def test_lora_trains_only_adapter_parameters():
    """A matrix [O, I] gets R · (O + I) adapter parameters. The mesh shards those dimensions that it shards elsewhere."""
    everywhere = Workload("finetune", 8, 128)
    adapters = dataclasses.replace(everywhere, lora=LoraOptions(rank=4))
    heads, keys, (embed, mlp) = 16 * 128, 8 * 128, (SMALL["hidden_size"], SMALL["intermediate_size"])
    count = 4 * 3 * (2 * (heads + embed) + 2 * (keys + embed) + 3 * (mlp + embed))
    plan, memory = cost_model(SMALL, "", adapters, 1), cost_model(SMALL, "", adapters, 1).memory("train")
    assert plan.num_parameters - count == cost_model(SMALL, "", everywhere, 1).num_parameters
    assert (memory["gradients"], memory["optimizer"]) == (4 * count, 12 * count)
    assert memory["working set"] < cost_model(SMALL, "", everywhere, 1).memory("train")["working set"]
    only_some = dataclasses.replace(adapters, lora=LoraOptions(rank=4, target_modules=("q_proj",)))
    cut = cost_model(SMALL, "fsdp=4,tensor=2", only_some).memory("train")
    assert cut["gradients"] == 4 * 4 * 3 * (heads // 2 + embed // 4)


@pytest.mark.slow
def test_more_layers_by_extrapolation():
    workload = Workload("batch", 8, 128)
    by_depth = {}
    for depth in (1, 2, 3):
        by_depth[depth] = compiled(SMALL | {"num_hidden_layers": depth}, "tensor=8", workload, "decode")
    guess = extrapolate((by_depth[1], by_depth[2]), (1, 2), 3)
    real = by_depth[3]
    assert guess.argument_bytes == real.argument_bytes
    assert guess.collectives == real.collectives
    assert guess.flops == pytest.approx(real.flops, rel=0.01)
    assert guess.device_bytes == pytest.approx(real.device_bytes, rel=0.02)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="q_heads is 16, which the 32 shards of tensor do not divide"):
        cost_model(SMALL, "tensor=32", Workload("batch", 8, 128), num_devices=32)
    with pytest.raises(UsageError, match="batch is 6, which the 4 shards of data do not divide"):
        cost_model(SMALL, "data=4", Workload("batch", 6, 128))


def test_every_field_of_the_workload_changes_memory():
    base = Workload("finetune", 8, 256)
    memory = cost_model(SMALL, "fsdp=4,tensor=2", base).memory("train")
    for changed in ({"batch": 16}, {"context": 512}, {"remat": "none"}, {"remat": "selective"}):
        more = cost_model(SMALL, "fsdp=4,tensor=2", dataclasses.replace(base, **changed)).memory("train")
        assert more["saved activations"] > memory["saved activations"], changed
        assert math.isclose(more["parameters"], memory["parameters"])
    assert not np.isclose(sum(cost_model(SMALL, "fsdp=8", base).memory("train").values()), sum(memory.values()))


@pytest.mark.parametrize(
    ("command", "phase", "sizes"),
    [
        ("batch", "decode", [{"context": 512}, {"context": 4096}]),
        pytest.param("finetune", "train", [{"batch": 8}, {"batch": 32}], marks=pytest.mark.slow),
    ],
)
def test_loop_remainder_is_what_the_compiler_leaves_out(command, phase, sizes):
    """More pages, or more tokens in the loss, mean more iterations of a loop, of which the compiler counts one."""
    workloads = [Workload(command, **{"batch": 8, "context": 512} | size) for size in sizes]
    plans = [cost_model(SMALL, "data=4,tensor=2", workload) for workload in workloads]
    reports = [compiled(SMALL, "data=4,tensor=2", workload, phase) for workload in workloads]
    counted = [report.flops + plan.loop_remainder(phase).flops for plan, report in zip(plans, reports, strict=True)]
    more = plans[1].cost(phase).flops - plans[0].cost(phase).flops
    assert counted[1] - counted[0] == pytest.approx(more, rel=0.1)
    assert reports[1].flops - reports[0].flops < 0.9 * more


def test_extrapolation_ignores_a_decrease_with_depth():
    def compiled(flops: float, gathers: int) -> CompilerReport:
        numbers = {field.name: 1.0 for field in dataclasses.fields(CompilerReport)}
        numbers |= {"flops": flops, "argument_bytes": flops}
        return CompilerReport(**numbers | {"collectives": (CollectiveTotal("all-gather", gathers, 0.5 * gathers),)})

    guess = extrapolate((compiled(10, 7), compiled(12, 6)), (1, 2), 48)
    assert guess.flops == 104
    assert guess.device_bytes == guess.argument_bytes == 104, "arguments are there at every moment"
    assert guess.collectives == (CollectiveTotal("all-gather", 6, 3.0),)
