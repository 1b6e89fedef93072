"""Routing and its loss, and experts on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen_dist.errors import UsageError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import MoEConfig
from qwen_dist.models.moe import Experts, load_balancing_loss, route
from qwen_dist.models.parameters import random_parameters, with_parameters
from qwen_dist.planning.compile import parse_collectives
from qwen_dist.sharding import INFERENCE, RULE_SETS, ShardingContext, use_sharding


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_and_choices(normalize):
    logits = jnp.array([[[0.0, 2.0, 1.0, -1.0]]])
    scores, chosen = route(logits, 2, normalize)
    probabilities = np.exp([2.0, 1.0]) / np.exp([0.0, 2.0, 1.0, -1.0]).sum()
    assert chosen.tolist() == [[[1, 2]]]
    np.testing.assert_allclose(scores[0, 0], probabilities / probabilities.sum() if normalize else probabilities, rtol=1e-6)


def test_scores_are_never_narrower_than_float32():
    scores, _ = route(jnp.zeros((1, 1, 4), jnp.bfloat16), 2, True)
    assert scores.dtype == jnp.float32


def test_load_balancing_loss_is_transformers():
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((2, 9, 6)).astype(np.float32) for _ in range(3)]
    is_real = np.arange(9) >= np.array([[0], [4]])
    found = load_balancing_loss([jnp.asarray(layer) for layer in layers], 2, jnp.asarray(is_real))
    gates = tuple(torch.from_numpy(layer).reshape(-1, 6) for layer in layers)
    expected = load_balancing_loss_func(gates, 6, 2, torch.from_numpy(is_real).long())
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)


def test_load_balancing_loss_of_even_loads_is_the_number_of_experts_per_token():
    logits = jnp.log(jnp.array([[[4.0, 3.0, 1.0, 2.0], [1.0, 2.0, 4.0, 3.0]]]))
    assert float(load_balancing_loss([logits], 2, jnp.ones((1, 2), bool))) == pytest.approx(2, rel=1e-6)


# --- experts on several devices ---

MOE = MoEConfig(
    num_experts=16, experts_per_token=3, expert_size=8, shared_expert_size=None, normalize_scores=True, aux_loss_coef=0.0
)
B, T, D = 8, 6, 8
MESHES = ["expert=8", "data=2,expert=4", "fsdp=2,expert=4", "expert=4,tensor=2", "data=2,fsdp=2,expert=2", "tensor=8"]
QUICK = "fsdp=2,expert=2,tensor=2"
# Which experts the tokens choose: spread at random, all the same ones, or only those of the last device.
LOADS = {"random": (0, 16), "all to three": (0, 3), "all to the last device": (13, 16)}


def sharding_ctx(mesh, rules=INFERENCE):
    return ShardingContext(make_mesh(MeshConfig.parse(mesh)), rules)


@functools.lru_cache
def program(mesh, rules):
    """The mixture of some tokens, and its gradient by tokens, scores and weights; and the weights."""
    where = sharding_ctx(mesh, RULE_SETS[rules])
    module = Experts(MOE.num_experts, D, MOE.expert_size, dtype="float64", std=1.0)

    def loss(x, scores, parameters, chosen, towards):
        with use_sharding(where):
            y, each = with_parameters(module, parameters)(x, chosen, scores)
        return jnp.vdot(y, towards), (y, each)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)), random_parameters(module, where)


@functools.lru_cache
def mixed(mesh, rules, load):
    """Results for eight rows of tokens, some of them padding, and what they are the results of."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        low, high = LOADS[load]
        chosen = np.stack([rng.permutation(np.arange(low, high))[:3] for _ in range(B * T)]).reshape(B, T, 3)
        chosen[1, :2] = MOE.num_experts
        x, scores, towards = (rng.standard_normal(shape) for shape in ((B, T, D), (B, T, 3), (B, T, D)))
        run, parameters = program(mesh, rules)
        gradients, values = run(x, scores, parameters, chosen.astype(np.int32), towards)
    return jax.tree.map(np.asarray, (values, gradients)), (x, chosen, scores, parameters)


def test_the_mixture_is_the_plain_sum_over_experts():
    (((mixed_BTD, each_BTKD), _), (x, chosen, scores, parameters)) = mixed("", "inference", "random")
    gate_up, down = (np.asarray(parameters[name]) for name in ("gate_up_proj", "down_proj"))
    for b, t in np.ndindex(B, T):
        expected = np.zeros(D)
        for k in range(3):
            if (e := chosen[b, t, k]) < MOE.num_experts:
                gate, up = gate_up[e] @ x[b, t]
                one = down[e] @ (gate / (1 + np.exp(-gate)) * up)
                np.testing.assert_allclose(each_BTKD[b, t, k], one, rtol=1e-12, atol=1e-12)
                expected += scores[b, t, k] * one
        np.testing.assert_allclose(mixed_BTD[b, t], expected, rtol=1e-12, atol=1e-12)
    assert not mixed_BTD[1, :2].any()


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mesh", [QUICK, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES)])
def test_on_a_mesh_it_is_the_same_however_uneven_the_loads(mesh, load, rules):
    """Also where a device gets everything, which takes several rounds of exchange; gradients too."""
    found, _ = mixed(mesh, rules, load)
    expected, _ = mixed("", rules, load)
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(ours - one).max() <= 1e-12 * max(1, np.abs(one).max())


@functools.lru_cache
def exchanged(mesh, rules):
    """Every collective of the compiled mixture: kind and elements."""
    where = sharding_ctx(mesh, RULE_SETS[rules])
    # As many tokens as a row has are not a size that any weight has.
    module = Experts(MOE.num_experts, 64, 32, dtype="float32", std=1.0)
    parameters = random_parameters(module, where)

    def run(parameters, x, chosen, scores):
        with use_sharding(where):
            return with_parameters(module, parameters)(x, chosen, scores)[0]

    chosen = jnp.zeros((B, 5, 3), jnp.int32)
    text = jax.jit(run).lower(parameters, jnp.ones((B, 5, 64)), chosen, jnp.ones((B, 5, 3))).compile().as_text()
    return [(one.kind, max(elements for elements, _ in one.arrays)) for one in parse_collectives(text)]


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2", pytest.param("expert=8", marks=pytest.mark.slow)])
def test_tokens_travel_and_weights_do_not(mesh):
    found = exchanged(mesh, "inference")
    assert "all-to-all" in {kind for kind, _ in found}
    one_expert = 64 * 32
    assert all(elements < one_expert for kind, elements in found if kind == "all-gather"), found


def test_in_training_weights_are_gathered_over_fsdp_only():
    local = 2 * MOE.num_experts // 2 * 64 * 32  # gate and up of the experts of one of two parts
    gathered = [elements for kind, elements in exchanged("fsdp=4,expert=2", "train") if kind == "all-gather"]
    assert max(gathered) <= local


def test_experts_that_the_mesh_does_not_divide():
    module = Experts(12, D, 8, dtype="float32", std=1.0)
    with pytest.raises(
        UsageError, match=r"experts is 12, which the 8 shards of expert do not divide \(legal: 1, 2, 3, 4, 6"
    ):
        random_parameters(module, sharding_ctx("expert=8"))
