"""Packed checkpoints: dequantised bit for bit as written out in `packed_files`, on any mesh, and refused by name."""

import functools
import json

import jax
import numpy as np
import pytest
from packed_files import Packer, mostly_slow

from qwen_dist.checkpoint.load import make_load_plan
from qwen_dist.checkpoint.model import abstract_model, load_model
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError, UsageError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.ops.grouped_weight import GroupedWeight
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding

FORMS = {
    "gptq 4": Packer("gptq", 4, 32),
    "gptq 8": Packer("gptq", 8, 32),
    "gptq row": Packer("gptq", 4, 0),
    "gptq v2 zeros": Packer("gptq", 4, 16, symmetric=False, version="gptq_v2"),
    "gptq v2 8 zeros": Packer("gptq", 8, 32, symmetric=False, version="gptq_v2"),
    "gptq desc_act": Packer("gptq", 4, 32, act_order=True),
    "awq": Packer("awq", 4, 32, symmetric=False),
    "pack 4": Packer("pack-quantized", 4, 32, scale_dtype="bfloat16"),
    "pack 8 row": Packer("pack-quantized", 8, 0, scale_dtype="bfloat16"),
    "pack 4 zeros": Packer("pack-quantized", 4, 32, symmetric=False, scale_dtype="float32"),
    "pack 8 zeros": Packer("pack-quantized", 8, 32, symmetric=False),
    "pack act order": Packer("pack-quantized", 4, 16, act_order=True, scale_dtype="bfloat16"),
    "int 8": Packer("int-quantized", 8, 0, scale_dtype="bfloat16"),
    "int 8 zeros": Packer("int-quantized", 8, 32, symmetric=False, scale_dtype="bfloat16"),
    "int 4": Packer("int-quantized", 4, 32),
    "float 8": Packer("float-quantized", 8, 0, scale_dtype="bfloat16"),
    "float 8 groups": Packer("float-quantized", 8, 32, scale_dtype="float32"),
}


def context(mesh="data=1"):
    config = MeshConfig.parse(mesh)
    return ShardingContext(make_mesh(config, jax.devices()[: config.num_devices]), INFERENCE)


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name, strict=True)


DEFAULT = ("gptq 4", "gptq v2 zeros", "gptq desc_act", "awq", "pack 4 zeros", "int 8 zeros", "float 8")


@pytest.mark.parametrize("form", mostly_slow(FORMS, DEFAULT))
def test_dequantised_bit_for_bit(packed_checkpoint, form):
    """In chunks of a few rows; kept packed and dequantised for use, or dequantised after the load."""
    directory, plain = packed_checkpoint("qwen3", FORMS[form])
    load = functools.partial(load_model, sharding_ctx=context(), dtype="float32", host_memory_budget=2**18)
    expected = load(plain).parameters
    same(load(directory, quantize="none").parameters, expected)
    packed = load(directory, quantize="stored")
    assert packed.kept and any(x.dtype.itemsize == 1 for x in packed.parameters.values())
    module = with_parameters(packed.module, packed.parameters)
    for index in range(2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = functools.reduce(getattr, name.split("."), module.layers[index]).weight.get_value()
            assert isinstance(weight, GroupedWeight)
            array = np.asarray(jax.jit(lambda one: one.dequantize())(weight))
            np.testing.assert_array_equal(array, np.asarray(expected[f"layers.{index}.{name}.weight"]).reshape(array.shape))


SHARDED = [
    ("qwen3_moe", "gptq 4", "expert=2,tensor=2"),
    ("qwen3_5", "pack 4", "fsdp=2,tensor=2"),
    ("qwen3", "awq", "fsdp=2"),
    ("qwen3_moe", "awq", "fsdp=2"),
    ("qwen3_moe", "pack 4 zeros", "tensor=2"),
    ("qwen3_moe", "float 8", "expert=2,fsdp=2"),
    ("qwen3_5", "int 8", "tensor=2"),
    ("qwen3", "gptq desc_act", "fsdp=2"),
    ("qwen3", "gptq v2 zeros", "tensor=2"),
]


@pytest.mark.parametrize(("family", "form", "mesh"), mostly_slow(SHARDED, SHARDED[:3]))
def test_sharded_is_one_device(packed_checkpoint, family, form, mesh):
    """The arrays are the same, no process reads more than its share, and the logits are those of the dequantised model."""
    directory, plain = packed_checkpoint(family, FORMS[form])
    with jax.enable_x64(True):
        sharded = load_model(directory, context(mesh), dtype="float64", quantize="stored")
        one = load_model(directory, context(), dtype="float64", quantize="stored")
        same(sharded.parameters, one.parameters)
        expected = logits(load_model(plain, context(), dtype="float64"))
        np.testing.assert_allclose(logits(sharded), expected, rtol=1e-12, atol=1e-12)
    checkpoint = open_checkpoint(directory)
    model = abstract_model(checkpoint, context(mesh), "float32", quantize="stored")
    plan = make_load_plan(checkpoint, model.target, disk_shapes=model.disk_shapes, tied=model.is_tied, packed=model.packed)
    assert plan.bytes_read <= 1.05 * plan.bytes_needed


def logits(loaded):
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    positions = np.tile(np.arange(6, dtype=np.int32), (2, 1))

    @jax.jit
    def run(parameters):
        with use_sharding(loaded.sharding_ctx):
            model = with_parameters(loaded.module, parameters)
            return model.unembed(model(tokens, positions)[0])

    return np.asarray(run(loaded.parameters))


def test_rules_of_gptq_choose_layers(packed_checkpoint):
    """`-:` leaves layers out, which are then floats on disk; another rule changes the bits."""

    class Mixed(Packer):
        def config(self):
            return super().config() | {
                "dynamic": {"-:.*self_attn.*": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 16}}
            }

    eight = Packer("gptq", 8, 16)
    expected = {}

    def change(tensors):
        rng = np.random.default_rng(1)
        for name in [name for name in tensors if "self_attn" in name and name.endswith("_proj.qweight")]:
            layer = name.removesuffix(".qweight")
            rows, columns = tensors[layer + ".scales"].shape[1], tensors[layer + ".g_idx"].shape[0]
            for leaf in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{layer}.{leaf}"]
            tensors[layer + ".weight"] = expected[layer] = rng.standard_normal((rows, columns)).astype("float32")
        for index in range(2):
            layer = f"model.layers.{index}.mlp.down_proj"
            leaves, expected[layer] = eight.tensors(rng, 64, 96)
            tensors |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}

    directory, _ = packed_checkpoint("qwen3", Mixed("gptq", 4, 32), change)
    packed = load_model(directory, context(), dtype="float32", quantize="stored").parameters
    assert packed["layers.0.self_attn.q_proj.weight"].dtype == "float32"
    assert packed["layers.0.mlp.up_proj.weight"].dtype == "uint8"
    assert packed["layers.0.mlp.down_proj.weight"].dtype == "int8"
    loaded = load_model(directory, context(), dtype="float32", quantize="none").parameters
    for layer, value in expected.items():
        name = layer.removeprefix("model.") + ".weight"
        np.testing.assert_array_equal(np.asarray(loaded[name]).reshape(value.shape), value)


def test_groups_are_not_cut(packed_checkpoint):
    """96 channels of the MLP are three groups: four devices would cut one, and the error says so."""
    directory, _ = packed_checkpoint("qwen3", FORMS["pack 4"])
    with pytest.raises(
        UsageError, match=r"mlp has 3 groups of quantised weights, which the 2 shards of tensor do not divide"
    ):
        load_model(directory, context("tensor=2"), dtype="float32", quantize="stored")


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


CONTRADICTIONS = [
    ("gptq 4", {"bits": 8}, None, ["wrong shape: model.layers.0.mlp.down_proj.qweight", "qzeros"]),
    ("gptq 4", {"group_size": 16}, None, ["wrong shape: model.layers.0.mlp.down_proj.scales"]),
    ("gptq 4", {"dynamic": {"-:.*mlp.*": {}}}, None, ["leaves out model.layers.0.mlp.gate_proj", "layers.1.mlp.down_proj"]),
    ("gptq 4", {"checkpoint_format": "gptq_v2"}, None, ["layers.0.mlp.up_proj.qzeros has 7 where a symmetric", "has 8"]),
    ("gptq desc_act", {"desc_act": False}, None, ["g_idx is not in order, but config.json says desc_act false"]),
    ("gptq 4", {}, lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), ["missing: model.layers.0.mlp.up_proj.scales"]),
    ("gptq 4", {"sym": False}, None, ["sym is false with checkpoint_format gptq", "gptq_v2"]),
    ("gptq 4", {"bits": 3, "group_size": 7}, None, ["bits is 3; supported: 4, 8", "group_size is 7"]),
    ("gptq 4", {"dynamic": {"+:.*down.*": {"bits": 2}}}, None, ["dynamic, +:.*down.*: bits is 2"]),
    ("gptq 4", {"unheard_of": 1}, None, ["unknown keys", "unheard_of"]),
    ("float 8", {"config_groups": {"a": {"weights": {"strategy": "tensor"}}}}, None, ["strategy is 'tensor'"]),
    ("awq", {"version": "gemv"}, None, ["version is 'gemv'; supported: gemm"]),
    ("awq", {"modules_to_not_convert": ["self_attn"]}, None, ["leaves out model.layers.0.self_attn.q_proj"]),
    (
        "pack 4",
        {"format": "nvfp4-pack-quantized"},
        None,
        ["'nvfp4-pack-quantized'; supported: pack-quantized", "--quantize"],
    ),
    ("pack 4", {"kv_cache_scheme": {"num_bits": 8}}, None, ["kv_cache_scheme is set"]),
    ("pack 4", {"transform_config": {"a": 1}}, None, ["the weights are rotated"]),
    ("pack 4", {"ignore": ["re:.*down_proj"]}, None, ["leaves out model.layers.0.mlp.down_proj"]),
    ("int 8", {}, lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"), ["I8 on disk is never converted"]),
    (
        "float 8",
        {"quant_method": "bitsandbytes"},
        None,
        ["quantization 'bitsandbytes' is not supported: supported are fp8"],
    ),
]


@pytest.mark.fault
@pytest.mark.parametrize(("form", "changes", "change", "messages"), CONTRADICTIONS)
def test_what_contradicts_the_configuration_is_refused(packed_checkpoint, form, changes, change, messages):
    directory, _ = packed_checkpoint("qwen3", FORMS[form], change or (lambda tensors: None))
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(directory, context(), dtype="float32", quantize="stored")
    for message in messages:
        assert message in str(error.value)


def test_a_packed_checkpoint_is_not_quantised_again(packed_checkpoint):
    directory, _ = packed_checkpoint("qwen3", FORMS["awq"])
    with pytest.raises(UsageError, match="already quantised"):
        load_model(directory, context(), dtype="float32", quantize=QuantizeOptions("int8", 0))
