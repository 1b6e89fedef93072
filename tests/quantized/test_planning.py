"""A plan counts the bytes of packed weights, and the work of all of them."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "planning"))
from shapes import QWEN3_5_397B, QWEN3_8B, SMALL

from qwen_dist.checkpoint.quantized import Quantization
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig
from qwen_dist.planning.memory import CostModel, abstract_sharding_context
from qwen_dist.planning.workload import Workload
from qwen_dist.quantization.options import QuantizeOptions

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def cost_model(hf, mesh, quantize, num_devices=8):
    options = QuantizeOptions.of(quantize)
    workload = Workload("batch", 8, 1024, quantization=Quantization.of(hf, options))
    context = abstract_sharding_context(MeshConfig.parse(mesh), num_devices, workload)
    return CostModel.of(parse_model_config(hf), context, workload)


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8 + 16 / 128), ("int4", 4 + 16 / 32), ("fp8", 8)])
def test_parameters_take_their_bits(quantize, bits):
    plain, packed = (cost_model(QWEN3_8B, "fsdp=2,tensor=4", one) for one in ("none", quantize))
    outside = sum(one.local_bytes for one in plain.sizes.outside)
    weights = plain.memory("decode")["parameters"] - outside
    expected = outside + weights * bits / 16
    assert packed.memory("decode")["parameters"] == pytest.approx(expected, rel=2e-3)
    assert packed.num_parameters == plain.num_parameters
    assert packed.cost("decode").flops == plain.cost("decode").flops
    assert packed.cost("decode").bytes < 0.8 * plain.cost("decode").bytes
    assert packed.memory("decode")["working set"] > plain.memory("decode")["working set"]


def test_published_fp8_is_planned_from_its_configuration():
    """Of 397B, half of the bytes of bfloat16, and a scale of 32 bits for each row of a block."""
    plain = cost_model(QWEN3_5_397B, "expert=8,tensor=2,fsdp=4", "none", 64)
    packed = cost_model(QWEN3_5_397B | FP8, "expert=8,tensor=2,fsdp=4", "stored", 64)
    ratio = packed.memory("decode")["parameters"] / plain.memory("decode")["parameters"]
    assert 0.51 < ratio < 0.54
    assert str(packed.workload.quantization) == "weights as stored (fp8)"


@pytest.mark.slow
def test_the_compiler_has_room_for_one_weight_at_a_time():
    """The peak of the compiled step is that of the plan, give or take what the compiler adds: no copy of all weights."""
    from qwen_dist.planning.chips import Topology
    from qwen_dist.planning.compile import compile_program, lower, topology_mesh
    from qwen_dist.sharding import ShardingContext

    workload = Workload("batch", 8, 1024, quantization=Quantization.of(SMALL, QuantizeOptions.of("int4")))
    mesh = MeshConfig.parse("fsdp=2,tensor=4")
    context = ShardingContext(topology_mesh(Topology.parse("cpu:8"), mesh), workload.rules)
    report = compile_program(lower(parse_model_config(SMALL), context, workload, "decode"))
    planned = CostModel.of(parse_model_config(SMALL), context, workload).memory("decode")
    assert report.argument_bytes >= planned["parameters"]
    assert report.temporary_bytes < planned["working set"] + planned["parameters"]
