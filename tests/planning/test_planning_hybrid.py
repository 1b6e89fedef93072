"""Plans of hybrid models: delta nets have slots of fixed size, and attention every few layers has pages."""

import dataclasses
from typing import Any

import jax
import pytest
from shapes import QWEN3_5_397B, QWEN3_8_27B, QWEN3_NEXT_80B, SMALL_HYBRID, SMALL_HYBRID_MOE

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions
from qwen_dist.engine.runner import Runner
from qwen_dist.errors import UsageError, UserError
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import random_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.compile import CompilerReport, compile_program, lower, topology_mesh
from qwen_dist.planning.memory import CostModel, abstract_sharding_context
from qwen_dist.planning.plan import make_capacity_plan, plan_mesh
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext

LORA = LoraOptions(rank=4, target_modules=("in_proj_qkv", "out_proj", "q_proj", "down_proj"))


def cost_model(hf: dict[str, Any], topology: str, mesh: str, workload: Workload) -> CostModel:
    devices = Topology.parse(topology)
    sharding_ctx = abstract_sharding_context(MeshConfig.parse(mesh), devices.num_devices, workload)
    return CostModel.of(parse_model_config(hf), sharding_ctx, workload, compiler=devices.compiler)


def compiled(hf: dict[str, Any], topology: str, mesh: str, workload: Workload, phase: Phase) -> CompilerReport:
    sharding_ctx = ShardingContext(topology_mesh(Topology.parse(topology), MeshConfig.parse(mesh)), workload.rules)
    return compile_program(lower(parse_model_config(hf), sharding_ctx, workload, phase))


def check(
    hf: dict[str, Any],
    topology: str,
    mesh: str,
    workload: Workload,
    phase: Phase,
    *,
    memory_too: bool = True,
) -> None:
    """The flops and the memory of a plan are within 10 % of the compiler's."""
    plan, real = cost_model(hf, topology, mesh, workload), compiled(hf, topology, mesh, workload, phase)
    assert plan.cost(phase).flops == pytest.approx(real.flops + plan.loop_remainder(phase).flops, rel=0.1)
    assert not memory_too or sum(plan.memory(phase).values()) == pytest.approx(real.device_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("hf", "billions", "slot_mib", "token_kib"),
    [(QWEN3_NEXT_80B, 79.7, 72 + 1.69, 24), (QWEN3_8_27B, 26.9, 144 + 2.81, 64), (QWEN3_5_397B, 396, 180 + 3.16, 30)],
)
def test_sizes_of_released_models(hf, billions, slot_mib, token_kib):
    """Known counts: of parameters, of the state of a sequence, and of the keys and values of a token."""
    short, long = (cost_model(hf, "cpu:1", "", Workload("batch", 1, context)) for context in (64, 128))
    assert 1e-9 * short.num_parameters == pytest.approx(billions, rel=0.002)
    per_token = (long.memory("decode")["cache"] - short.memory("decode")["cache"]) / 64
    assert per_token == token_kib * 2**10
    assert (short.memory("decode")["cache"] - 64 * per_token) / 2**20 == pytest.approx(slot_mib, abs=0.01)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", pytest.param("tensor=4", marks=pytest.mark.slow)])
def test_parameters_and_cache_match_real_arrays(mesh):
    """Some parameters are float32 in a bfloat16 model, and so are the states."""
    config, workload = parse_model_config(SMALL_HYBRID), Workload("batch", 8, 1000)
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), workload.rules)
    module = Transformer(config, dtype="bfloat16")
    model = LoadedModel(config, module, random_parameters(module, sharding_ctx), sharding_ctx)
    runner = Runner(model, workload.batch)
    states = runner.start((workload.batch // runner.num_shards * 16,)).states
    memory = cost_model(SMALL_HYBRID, "cpu:8", mesh, workload).memory("decode")
    local = [
        sum(x.addressable_shards[0].data.nbytes for x in arrays)
        for arrays in (model.parameters.values(), jax.tree.leaves(states))
    ]
    assert (memory["parameters"], memory["cache"]) == tuple(local)


@pytest.mark.parametrize(
    ("mesh", "phase"),
    [
        ("data=2,fsdp=2,tensor=2", "prefill"),
        ("tensor=4", "decode"),
        pytest.param("data=2,fsdp=2,tensor=2", "decode", marks=pytest.mark.slow),
        # More devices than key heads: each holds the keys that its queries read.
        pytest.param("tensor=8", "prefill", marks=pytest.mark.slow),
        pytest.param("tensor=8", "decode", marks=pytest.mark.slow),
    ],
)
def test_inference_is_within_10_percent_of_the_compiler(mesh, phase):
    check(SMALL_HYBRID, "cpu:8", mesh, Workload("batch", 32, 256), phase)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2", ""])
@pytest.mark.parametrize("lora", [None, LORA])
def test_training_is_within_10_percent_of_the_compiler(mesh, lora):
    """With adapters XLA CPU keeps what it gathers over fsdp for all layers, in models without delta nets, too."""
    workload, is_kept = Workload("finetune", 8, 256, lora=lora), lora is not None and "fsdp" in mesh
    check(SMALL_HYBRID, "cpu:8", mesh, workload, "train", memory_too=not is_kept)


@pytest.mark.slow
@pytest.mark.parametrize("hf", [SMALL_HYBRID, SMALL_HYBRID_MOE])
@pytest.mark.parametrize(("command", "phase"), [("batch", "prefill"), ("batch", "decode"), ("finetune", "train")])
def test_flops_of_plans_for_tpus_are_those_of_the_compiler(hf, command, phase):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    mesh = "fsdp=2,expert=2,tensor=2" if hf is SMALL_HYBRID_MOE else "data=2,fsdp=2,tensor=2"
    workload = Workload(command, 32, 512, lora=LORA if phase == "train" else None)
    # The temporaries of one layer are a large part of the memory of these two: docs/scaling.md has whole models.
    check(hf, "v5e:2x4", mesh, workload, phase, memory_too=False)


@pytest.mark.slow
def test_a_libtpu_of_another_jax_is_named():
    """jax 0.10.2 cannot read some programs that libtpu 0.0.52 compiled; 0.0.42 is the one that belongs to it."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    try:
        report = compiled(SMALL_HYBRID, "v5p:2x2x1", "data=2,tensor=2", Workload("batch", 32, 512), "prefill")
    except UserError as error:
        assert "install the libtpu of this jax: pip install 'jax[tpu]==" in str(error)
    else:
        assert report.collectives


def test_a_mesh_must_divide_the_key_heads():
    with pytest.raises(UsageError, match="key_heads is 8, which the 16 shards of tensor do not divide"):
        cost_model(SMALL_HYBRID, "cpu:16", "tensor=16", Workload("batch", 8, 128))


def test_adapters_of_delta_nets_and_attention():
    """Each kind of layer has only some of the targets. A matrix [O, I] gets R · (O + I) parameters."""
    workload = Workload("finetune", 8, 128, lora=LORA)
    heads, channels, values = 2 * 16 * 64, 8 * (2 * 64 + 2 * 128), 16 * 128
    embed, mlp = SMALL_HYBRID["hidden_size"], SMALL_HYBRID["intermediate_size"]
    count = 4 * (channels + embed + embed + values + heads + embed + 2 * (embed + mlp))
    with_adapters = cost_model(SMALL_HYBRID, "cpu:1", "", workload)
    assert with_adapters.memory("train")["gradients"] == 4 * count
    without = cost_model(SMALL_HYBRID, "cpu:1", "", dataclasses.replace(workload, lora=None))
    assert with_adapters.num_parameters - without.num_parameters == count
    assert with_adapters.cost("train").flops < 0.8 * without.cost("train").flops


def test_a_decode_step_reads_and_writes_every_slot():
    short = cost_model(QWEN3_8_27B, "v5e:8x8", "data=8,tensor=8", Workload("batch", 64, 64))
    memory, cost = short.memory("decode"), short.cost("decode")
    slots = 8 * (144 + 2.8125) * 2**20 / 8
    assert cost.bytes == memory["parameters"] + memory["cache"] + slots
    # Twice the batch adds its slots, its pages and nothing else.
    more = (
        cost_model(QWEN3_8_27B, "v5e:8x8", "data=8,tensor=8", Workload("batch", 128, 64)).cost("decode").bytes - cost.bytes
    )
    assert more == memory["cache"] + slots


@pytest.mark.parametrize("context", [64, 65536])
def test_the_largest_batch_counts_slots_and_pages(context):
    config, topology, mesh = parse_model_config(QWEN3_8_27B), Topology.parse("v5e:8x8"), "fsdp=2,data=8,tensor=4"
    plan = make_capacity_plan("27b", config, topology, Workload("batch", 64, context), mesh)

    def fits(batch: int) -> bool:
        return plan_mesh(config, topology, Workload("batch", batch, context), mesh).fits

    assert fits(plan.max_batch) and not fits(plan.max_batch + 8)
    room = topology.chip.memory_bytes - plan.chosen.phases[0].memory["parameters"]
    of_row = ((144 + 2.8125) * 2**20 + 64 * 2**10 * context) / 4
    # The working set takes the rest; where pages are few, that of the slots that a step computes.
    assert 0.6 * room < plan.max_batch / 8 * of_row < room
