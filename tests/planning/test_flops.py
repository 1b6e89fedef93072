"""What layers say they cost, against traced programs and known counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from shapes import QWEN3_5_397B, QWEN3_8_27B, QWEN3_NEXT_80B
from traced_flops import product_flops

from qwen_dist.checkpoint.adapter_layers import linear_layers
from qwen_dist.hf_config import parse_model_config
from qwen_dist.models.transformer import Transformer, layer_cost
from qwen_dist.ops.cost import Step
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule, delta_rule_cost

# Key heads, value heads of each, channels of keys and values: all different.
G, R, K, V = 2, 3, 8, 12


def row(num_tokens: int) -> Step:
    return Step("train", 1, num_tokens, num_tokens, num_keys=0, num_pages=0, dtype="float32")


def traced(num_tokens: int, *, backward: bool) -> float:
    """The flops of the rule's products for one row, or of the rule and its gradient."""

    def run(inputs: DeltaInputs) -> jax.Array:
        return delta_rule(inputs)[0].sum()

    tokens = (1, num_tokens, G)
    shapes = [(*tokens, K), (*tokens, K), (*tokens, R, V), (*tokens, R), (*tokens, R)]
    inputs = DeltaInputs(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return product_flops(jax.make_jaxpr(jax.grad(run) if backward else run)(inputs).jaxpr)


@pytest.mark.parametrize("num_tokens", [32, 256])
def test_the_delta_rule_in_chunks_and_its_gradient(num_tokens):
    cost = delta_rule_cost(row(num_tokens), G, R, K, V)
    assert cost.flops.forward == traced(num_tokens, backward=False)
    assert cost.flops.forward + cost.flops.backward == traced(num_tokens, backward=True)
    # The products with the state before each chunk; a report has those of the first chunk.
    assert cost.uncounted_flops.forward < cost.flops.forward
    assert (cost.uncounted_flops.forward > 0) == (num_tokens > 64)


def test_a_step_of_the_delta_rule():
    """Besides its products it decays the state (1 flop an element) and adds an outer product to it (2)."""
    flops = delta_rule_cost(row(1), G, R, K, V).flops
    assert flops.forward == traced(1, backward=False) + 3 * G * R * K * V


@pytest.mark.parametrize(
    ("hf", "projections", "step"), [(QWEN3_NEXT_80B, 67.4, 3.67), (QWEN3_8_27B, 231.7, 5.51), (QWEN3_5_397B, 235.9, 7.34)]
)
def test_millions_of_flops_of_a_delta_net_in_released_models(hf, projections, step):
    """Per token and layer; known counts."""
    config = parse_model_config(hf)
    module = Transformer(dataclasses.replace(config, layers=config.layers[:1]), dtype="bfloat16")
    linears = [layer for name, layer in linear_layers(module) if ".linear_attn." in name]
    weights = sum(math.prod(size for _, size in layer.out_sizes + layer.in_sizes) for layer in linears)
    assert 2e-6 * weights == pytest.approx(projections, abs=0.05)
    net = module.layers[0].mixer
    convolution = 2 * math.prod(net.conv1d.weight.get_value().shape)
    assert 1e-6 * (layer_cost(net, row(1)).flops.forward - convolution) == pytest.approx(step, abs=0.005)
