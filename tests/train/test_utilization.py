"""A step needs three times the flops of a traced forward pass; peaks are known for listed devices only."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.checkpoint.model import load_model
from qwen_dist.config import LoraOptions
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.planning.chips import CHIPS, chip_of_device
from qwen_dist.sharding import TRAIN, ShardingContext
from qwen_dist.train.console import describe_step
from qwen_dist.train.lora import new_adapter
from qwen_dist.train.run import StepMetrics
from qwen_dist.train.utilization import StepFlops, peak_flops_per_second


@pytest.fixture
def loaded(tiny_checkpoint):
    directory = tiny_checkpoint("qwen3", num_hidden_layers=1)
    return load_model(directory, ShardingContext(make_mesh(MeshConfig()), TRAIN), dtype="float32")


def dots(jaxpr) -> float:
    """The flops of all products in a traced program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * np.prod([shape[dim] for dim in contracted])
        total += sum(dots(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def test_a_step_needs_three_times_the_products_of_a_forward_pass(loaded):
    # One block of queries, so the program computes the full square of scores. CPUs have other products for fewer rows.
    T = 128
    positions = np.arange(T, dtype=np.int32)[None]

    def forward(parameters):
        module = with_parameters(loaded.module, parameters)
        return module.unembed(module(jnp.zeros((1, T), jnp.int32), jnp.asarray(positions))[0])

    traced = dots(jax.make_jaxpr(forward)(loaded.parameters).jaxpr)
    config = loaded.config
    square = 4 * T * T * config.num_attention_heads * config.head_dim
    seen = square * (T + 1) / (2 * T)
    found = StepFlops(loaded, loaded.parameters)(positions)
    assert found == pytest.approx(3 * (traced - square + seen), rel=1e-12)


def test_frozen_weights_need_no_gradient_and_padding_needs_nothing(loaded):
    positions = np.arange(16, dtype=np.int32)[None]
    flops = StepFlops(loaded, loaded.parameters)
    adapted, trained = new_adapter(loaded, LoraOptions(rank=1, target_modules=("q_proj",)), dtype="float32")
    assert 0.65 < StepFlops(adapted, trained)(positions) / flops(positions) < 0.75
    padded = np.concatenate([positions, np.full_like(positions, -1)], axis=1)
    assert flops(padded) == flops(positions)


def test_the_peak_of_known_devices():
    assert chip_of_device("TPU v5 lite") is CHIPS["v5e"] and chip_of_device("TPU v5") is CHIPS["v5p"]
    assert peak_flops_per_second(jax.devices(), "bfloat16") is None, "the peak of a CPU is not known"


def test_the_line_of_a_step_has_the_mfu():
    metrics = StepMetrics(1, 2, 3.0, 1.0, 1e-3, 0.5, 100, 0.4321)
    assert "200 tokens/s, 0.50 s/step, MFU 43.2%" in describe_step(metrics)
