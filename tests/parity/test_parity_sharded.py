"""Logits and gradients of a sharded run equal those of one device, on every kind of mesh, under every rule set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.checkpoint.model import load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.parity.inputs import random_tokens
from qwen_dist.sharding import RULE_SETS, ShardingContext, use_sharding

pytestmark = pytest.mark.parity

# Every size is divisible by 8, except the number of key/value heads, which are then replicated.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8, "vocab_size": 320}
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=4,fsdp=2", "data=2,tensor=4", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]
MESHES += ["context=4", "fsdp=2,context=2,tensor=2"]
QUICK = "data=2,fsdp=2,tensor=2"
# Layers with and without experts, a shared expert, and every axis that a mesh can have.
MOE_SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "vocab_size": 320, "num_experts": 8}
MOE_MESHES = ["expert=8", "data=2,expert=4", "expert=4,tensor=2", "fsdp=4,expert=2", "data=2,fsdp=2,tensor=2"]
MOE_MESHES += ["expert=2,context=2,tensor=2"]
QUICK_MOE = "fsdp=2,expert=2,tensor=2"
# A gated delta net and gated attention, each before experts.
HYBRID_SIZES = SIZES | {"head_dim": 16, "linear_num_key_heads": 8, "linear_num_value_heads": 16}
HYBRID_MESHES = [*MESHES, *MOE_MESHES]
QUICK_HYBRID = "context=2,expert=2,tensor=2"
INPUTS = random_tokens(320, 20, 8)


@pytest.fixture(scope="module")
def run(tiny_checkpoint):
    checkpoints = {
        "qwen3": tiny_checkpoint("qwen3", num_hidden_layers=1, **SIZES),
        "qwen2_moe": tiny_checkpoint("qwen2_moe", num_hidden_layers=2, **MOE_SIZES),
        "qwen3_next": tiny_checkpoint("qwen3_next", num_hidden_layers=2, num_experts=8, mlp_only_layers=[], **HYBRID_SIZES),
        "qwen3_5": tiny_checkpoint("qwen3_5", num_hidden_layers=2, **HYBRID_SIZES),
    }

    @functools.lru_cache
    def run(mesh, rules, dtype, family="qwen3"):
        """Logits, and the gradient of a loss over all of them, by parameter.

        Inference in float32 runs the kernels where there are some, and these have no gradient: then the logits only.
        """
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), RULE_SETS[rules])
        tokens, positions = jnp.asarray(INPUTS.tokens), jnp.asarray(INPUTS.positions)

        def loss(parameters, module):
            with use_sharding(sharding_ctx):
                model = with_parameters(module, parameters)
                hidden, *_ = model(tokens, positions)
                logits = model.unembed(hidden)
            real = jnp.where((positions >= 0)[..., None], jax.nn.log_softmax(logits), 0)
            return jnp.mean(jnp.square(real)), logits

        with jax.enable_x64(dtype == "float64"):
            loaded = load_model(checkpoints[family], sharding_ctx, dtype=dtype)
            if rules == "inference" and dtype == "float32":
                _, logits = jax.jit(functools.partial(loss, module=loaded.module))(loaded.parameters)
                return sharding_ctx, loaded, logits, {}
            differentiate = jax.grad(functools.partial(loss, module=loaded.module), has_aux=True)
            shardings = {name: value.sharding for name, value in loaded.parameters.items()}
            gradients, logits = jax.jit(differentiate, out_shardings=(shardings, None))(loaded.parameters)
        return sharding_ctx, loaded, logits, gradients

    return run


def relative(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def axes_per_dim(spec):
    """The mesh axes of every dimension: jax omits trailing dimensions that are not sharded."""
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return axes + [()] * (3 - len(axes))


def check(run, mesh, rules, dtype, bound, family="qwen3"):
    _, _, expected_logits, expected_gradients = run("", rules, dtype, family)
    sharding_ctx, loaded, logits, gradients = run(mesh, rules, dtype, family)
    real = INPUTS.is_real
    assert relative(np.asarray(logits)[real], np.asarray(expected_logits)[real]) <= bound
    if dtype == "float64":
        assert np.abs(np.asarray(logits)[real] - np.asarray(expected_logits)[real]).max() <= bound
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) <= bound, name
        assert gradient.sharding == loaded.parameters[name].sharding
    expected = sharding_ctx.activation("logits", logits.shape, ("batch", "length", "vocab"))
    assert axes_per_dim(logits.sharding.spec) == axes_per_dim(expected.spec)
    assert logits.sharding.is_equivalent_to(expected, logits.ndim)


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("mesh", [pytest.param(mesh, marks=[] if mesh == QUICK else pytest.mark.slow) for mesh in MESHES])
def test_float64_equals_one_device(run, mesh, rules):
    check(run, mesh, rules, "float64", 1e-12)


@pytest.mark.parametrize("rules", ["train", pytest.param("inference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [QUICK_MOE, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MOE_MESHES)])
def test_moe_in_float64_equals_one_device(run, mesh, rules):
    check(run, mesh, rules, "float64", 1e-12, "qwen2_moe")


@pytest.mark.parametrize("rules", ["inference", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [QUICK_HYBRID, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in HYBRID_MESHES)])
def test_hybrids_in_float64_equal_one_device(run, mesh, rules):
    check(run, mesh, rules, "float64", 1e-12, "qwen3_next" if "expert" in mesh else "qwen3_5")


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("mesh", ["tensor=8", "fsdp=4,tensor=2", QUICK])
def test_float32_equals_one_device(run, mesh, rules):
    check(run, mesh, rules, "float32", 1e-5)


def test_parameters_are_sharded(run):
    """Otherwise the tests above would compare one device with itself."""
    _, loaded, logits, _ = run(QUICK, "train", "float64")
    weight = loaded.parameters["layers.0.mlp.gate_proj.weight"]
    assert weight.addressable_shards[0].data.size == weight.size // 4  # fsdp and tensor; data repeats it
    assert logits.addressable_shards[0].data.size == logits.size // 8
