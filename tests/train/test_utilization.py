"""A step needs three times the flops of a traced forward pass; peaks are known for listed devices only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_flops import product_flops

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


def test_a_step_needs_three_times_the_products_of_a_forward_pass(loaded):
    # One block of queries, so the program computes the full square of scores. CPUs have other products for fewer rows.
    T = 128
    positions = np.arange(T, dtype=np.int32)[None]

    def forward(parameters):
        module = with_parameters(loaded.module, parameters)
        return module.unembed(module(jnp.zeros((1, T), jnp.int32), jnp.asarray(positions))[0])

    traced = product_flops(jax.make_jaxpr(forward)(loaded.parameters).jaxpr)
    config = loaded.config
    square = 4 * T * T * config.num_attention_heads * config.head_dim
    seen = square * (T + 1) / (2 * T)
    found = StepFlops(loaded, loaded.parameters)(positions)
    assert found == pytest.approx(3 * (traced - square + seen), rel=1e-12)


def test_a_step_of_a_hybrid(tiny_checkpoint):
    """As above. Besides the products a delta net has a convolution.

    The gradient of its inverse has two products, and that of the sums of its gates one.
    """
    directory = tiny_checkpoint("qwen3_5", num_hidden_layers=2)
    loaded = load_model(directory, ShardingContext(make_mesh(MeshConfig()), TRAIN), dtype="float32")
    T, C, value_heads = 128, 64, 4
    positions = np.arange(T, dtype=np.int32)[None]

    def forward(parameters):
        module = with_parameters(loaded.module, parameters)
        return module.unembed(module(jnp.zeros((1, T), jnp.int32), jnp.asarray(positions))[0])

    traced = product_flops(jax.make_jaxpr(forward)(loaded.parameters).jaxpr)
    square = 4 * T * T * 6 * 16
    convolution = T * 2 * 4 * (2 * 2 * 8 + 4 * 12)
    square_product = T / C * value_heads * 2 * C**3
    seen = square * (T + 1) / (2 * T)
    three_times = traced - square + seen + convolution - (10 + 1) * square_product
    assert StepFlops(loaded, loaded.parameters)(positions) == 3 * three_times + (10 + 2 + 1 + 1) * square_product


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
