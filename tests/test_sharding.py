"""Sharding: what a `ShardingContext` refuses, the rules on real parameters, and the same logits on every mesh."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_dist.checkpoint.model import load_model
from qwen_dist.errors import UsageError
from qwen_dist.hf_config import read_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import abstract_parameters, random_parameters, with_parameters
from qwen_dist.models.transformer import Transformer
from qwen_dist.sharding import INFERENCE, LOGICAL_AXES, RULE_SETS, TRAIN, RuleSet, ShardingContext, use_sharding

# 8 divides the sizes, except the 2 key/value heads.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 344, "num_hidden_layers": 2}
# Sums have another order: measured 3.6e-7 to 5.0e-7.
TOLERANCE = 2e-6

MESHES = ["tensor=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=8", "data=8", "data=2,context=2,tensor=2"]
PARAMETER_SPECS = {
    "embed_tokens.weight": P("tensor", "fsdp"),
    "lm_head.weight": P("tensor", "fsdp"),
    "norm.weight": P("fsdp"),
    "layers.0.input_layernorm.weight": P("fsdp"),
    "layers.0.post_attention_layernorm.weight": P("fsdp"),
    "layers.0.self_attn.q_proj.weight": P("tensor", None, "fsdp"),
    "layers.0.self_attn.k_proj.weight": P("tensor", None, "fsdp"),
    "layers.0.self_attn.v_proj.weight": P("tensor", None, "fsdp"),
    "layers.0.self_attn.o_proj.weight": P("fsdp", "tensor", None),
    "layers.0.self_attn.q_norm.weight": P(None),
    "layers.0.self_attn.k_norm.weight": P(None),
    "layers.0.mlp.gate_proj.weight": P("tensor", "fsdp"),
    "layers.0.mlp.up_proj.weight": P("tensor", "fsdp"),
    "layers.0.mlp.down_proj.weight": P("fsdp", "tensor"),
}


def sharding_ctx(mesh: str, rules: RuleSet = INFERENCE) -> ShardingContext:
    return ShardingContext(make_mesh(MeshConfig.parse(mesh)), rules)


def sharded_axes(spec: P, mesh: jax.sharding.Mesh, ndim: int) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes that shard each dimension, without those of size 1, which shard nothing."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    entries += [()] * (ndim - len(entries))
    return tuple(tuple(axis for axis in entry if mesh.shape[axis] > 1) for entry in entries)


# --- ShardingContext ---


@pytest.mark.parametrize("rules", RULE_SETS.values(), ids=RULE_SETS)
def test_rules_name_only_logical_axes_and_mesh_axes(rules):
    for table in (rules.parameters, rules.activations):
        assert table.keys() <= LOGICAL_AXES
        assert {axis for axes in table.values() for axis in axes} <= set(make_mesh(MeshConfig()).axis_names)


def test_unknown_logical_names():
    with pytest.raises(UsageError, match=r"w \(4, 4\) .*'heads' is not a logical axis; there are batch, embed"):
        sharding_ctx("").parameter("w", (4, 4), ("heads", "embed"))


def test_rules_for_axes_that_are_not_in_the_mesh():
    rules = RuleSet("pipelined", {"embed": ("stage",)}, {})
    with pytest.raises(UsageError, match="the rules split embed over stage, which the mesh does not have"):
        sharding_ctx("tensor=2", rules).parameter("w", (4,), ("embed",))


def test_one_mesh_axis_for_two_dimensions():
    with pytest.raises(UsageError, match="mesh axis tensor would split both vocab and mlp"):
        sharding_ctx("tensor=2").parameter("w", (4, 4), ("vocab", "mlp"))
    sharding = sharding_ctx("fsdp=2").parameter("w", (4, 4), ("vocab", "mlp"))  # an axis of size 1 splits nothing
    assert sharding.spec == P(None, None)


def test_sizes_that_do_not_divide_name_everything_and_the_legal_sizes():
    with pytest.raises(UsageError) as error:
        sharding_ctx("fsdp=4,tensor=2").parameter("layers.0.mlp.up_proj.weight", (45, 30), ("mlp", "embed"))
    assert str(error.value) == (
        "layers.0.mlp.up_proj.weight (45, 30) does not fit mesh fsdp=4,tensor=2: "
        "mlp is 45, which the 2 shards of tensor do not divide (legal: 1, 3, 5, 9, 15, 45); "
        "embed is 30, which the 4 shards of fsdp do not divide (legal: 1, 2, 3, 5, 6, 10, 15, 30)"
    )


def test_activations_have_separate_rules():
    shape, axes = (8, 16, 32), ("batch", "length", "embed")
    mesh = "data=2,fsdp=2,tensor=2"
    assert sharding_ctx(mesh, TRAIN).activation("x", shape, axes).spec == P(("data", "fsdp"), None, None)
    assert sharding_ctx(mesh, INFERENCE).activation("x", shape, axes).spec == P("data", None, "fsdp")
    assert sharding_ctx("context=4", TRAIN).activation("x", shape, axes).spec == P(None, "context", None)
    assert sharding_ctx("context=4").activation("x", (8, 1, 32), axes).spec == P(None, None, None)  # a decode step
    assert (sharding_ctx(mesh, TRAIN).batch_multiple(), sharding_ctx(mesh, INFERENCE).batch_multiple()) == (4, 2)
    with pytest.raises(UsageError, match="batch is 6, which the 4 shards of data×fsdp do not divide"):
        sharding_ctx(mesh, TRAIN).activation("x", (6, 16, 32), axes)


@pytest.mark.parametrize(
    ("kv_heads", "mesh", "axis"),
    [(8, "tensor=4", "tensor"), (4, "tensor=4", "tensor"), (2, "tensor=4", None), (1, "tensor=8", None)],
)
def test_key_value_heads_are_sharded_or_replicated(kv_heads, mesh, axis):
    sharding = sharding_ctx(mesh).parameter("k", (kv_heads, 16, 32), ("kv_heads", "head_dim", "embed"))
    assert sharding.spec == P(axis, None, None)


@pytest.mark.parametrize(("kv_heads", "mesh"), [(3, "tensor=4"), (6, "tensor=4"), (5, "tensor=2")])
def test_key_value_heads_that_can_be_neither(kv_heads, mesh):
    with pytest.raises(UsageError, match=rf"kv_heads is {kv_heads}, .* \(legal: 1, .*, or a multiple of {kv_heads}\)"):
        sharding_ctx(mesh).parameter("k", (kv_heads, 16, 32), ("kv_heads", "head_dim", "embed"))


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, tiny_checkpoint):
    """The directory has no weights, so reading them would be another error."""
    config = json.loads((tiny_checkpoint("qwen3", **SIZES) / "config.json").read_text())
    config |= {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 345}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as error:
        load_model(tmp_path, sharding_ctx("tensor=4"), dtype="float32")
    message = str(error.value)
    assert message.startswith("the model does not fit the mesh:\n  - ")
    assert "embed_tokens" not in message  # an uneven vocabulary is replicated
    assert re.search(r"q_heads is 6, .*: layers.0.self_attn.\w+.weight \(.*\) and \d+ more", message)
    assert re.search(r"kv_heads is 3, .*or a multiple of 3\): layers.0.self_attn.k_proj.weight \(3, 10, 40\) and", message)
    assert "norm.weight" not in message


def test_a_deep_model_that_does_not_fit_is_a_short_error(tiny_checkpoint):
    config = read_model_config(tiny_checkpoint("qwen3", **(SIZES | {"num_hidden_layers": 9, "intermediate_size": 45})))
    with pytest.raises(UsageError, match=r"mlp is 45.*and 26 more$") as error:
        abstract_parameters(Transformer(config, dtype="float32"), sharding_ctx("tensor=2"))
    assert len(str(error.value).splitlines()) == 2  # one line for each reason


# --- the model on meshes ---


@pytest.fixture(scope="module")
def run(tiny_checkpoint):
    """A function (mesh, rules) -> parameters and logits of the same four prompts on that mesh."""
    directory = tiny_checkpoint("qwen3", **SIZES)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (8, 24), dtype=np.int32)
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    positions[1, :7] = -1

    @functools.cache
    def on(mesh: str, rules: str):
        model = load_model(directory, sharding_ctx(mesh, RULE_SETS[rules]), dtype="float32")

        @jax.jit
        def logits(parameters):
            with use_sharding(model.sharding_ctx):
                module = with_parameters(model.module, parameters)
                return module.unembed(module(tokens, positions)[0])

        return model.parameters, logits(model.parameters)

    return on


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("mesh", MESHES)
def test_logits_on_a_mesh_equal_those_of_one_device(run, mesh, rules):
    _, expected = run("", "inference")
    _, logits = run(mesh, rules)
    ours, one = np.asarray(logits), np.asarray(expected)
    ours, one = np.delete(ours, 1, axis=0), np.delete(one, 1, axis=0)
    assert np.linalg.norm(ours - one) / np.linalg.norm(one) < TOLERANCE
    batch = {"inference": ("data",), "train": ("data", "fsdp")}[rules]
    jax_mesh = logits.sharding.mesh
    assert sharded_axes(logits.sharding.spec, jax_mesh, 3) == sharded_axes(P(batch, "context", "tensor"), jax_mesh, 3)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_sharded_by_the_rules(run, mesh):
    parameters, _ = run(mesh, "inference")
    kinds = {re.sub(r"layers\.\d+", "layers.0", name) for name in parameters}
    assert kinds == PARAMETER_SPECS.keys()
    for name, value in parameters.items():
        expected = PARAMETER_SPECS[re.sub(r"layers\.\d+", "layers.0", name)]
        if mesh == "tensor=8" and re.search("[kv]_proj", name):
            expected = P(None, None, "fsdp")  # 2 heads on 8 devices are replicated
        assert sharded_axes(value.sharding.spec, value.sharding.mesh, value.ndim) == sharded_axes(
            expected, value.sharding.mesh, value.ndim
        ), name


def test_random_parameters_are_the_same_on_every_mesh(tiny_checkpoint):
    config = read_model_config(tiny_checkpoint("qwen3", **SIZES))
    module = Transformer(config, dtype="float32")
    one, sharded = (random_parameters(module, sharding_ctx(mesh)) for mesh in ("", "fsdp=2,tensor=2"))
    assert one.keys() == sharded.keys() == abstract_parameters(module, sharding_ctx("")).keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, sharded[name])
        if name.endswith("norm.weight"):
            assert np.all(np.asarray(value) == 1)
        else:
            # 400 to 13,760 draws: the sample's standard deviation is within 4 of its standard errors.
            assert abs(np.std(value) / config.initializer_range - 1) < 4 / np.sqrt(2 * value.size)
    values = [np.asarray(value).ravel()[:400] for name, value in one.items() if not name.endswith("norm.weight")]
    for index, value in enumerate(values):
        assert not any(np.array_equal(value[: other.size], other[: value.size]) for other in values[:index])
