"""Hybrid models in float64: logits of transformers at lengths around a chunk's, whatever the padding and the split."""

import functools

import jax
import numpy as np
import pytest

from qwen_dist.checkpoint.model import load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.state import empty_states
from qwen_dist.models.state_spec import cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import pages_for
from qwen_dist.ops.step_rows import indices_in_order
from qwen_dist.parity.inputs import Inputs
from qwen_dist.parity.reference import Reference
from qwen_dist.sharding import INFERENCE, ShardingContext

FAMILIES = ["qwen3_next", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_5", "qwen3_5_moe"))]
LENGTHS = (1, 31, 32, 33, 63, 64, 65, 600)
BOUND = 1e-10


def make_rows(lengths):
    """Rows of random tokens, and one of a single token repeated, whose keys are all equal."""
    rng = np.random.default_rng(0)
    return [*(rng.integers(0, 311, length).tolist() for length in lengths), [7] * 200]


@pytest.fixture(scope="module")
def opened(tiny_checkpoint):
    @functools.cache
    def make(family):
        directory = tiny_checkpoint(family, num_hidden_layers=2, max_position_embeddings=8192)
        with jax.enable_x64(True):
            return directory, load_model(directory, ShardingContext(make_mesh(MeshConfig()), INFERENCE), dtype="float64")

    return make


def logits(model, tokens_BT, positions_BT, states=None, pages_per_row=0):
    with jax.enable_x64(True):
        return _logits(model.module, state_specs(model.config, "float64"), pages_per_row)(
            model.parameters, tokens_BT, positions_BT, states
        )


@functools.cache
def _logits(module, specs, pages_per_row):
    @jax.jit
    def run(parameters, tokens_BT, positions_BT, states):
        model = with_parameters(module, parameters)
        indices = None if states is None else indices_in_order(len(cache_groups(specs)), positions_BT, 1, pages_per_row)
        x_BTD, states, _ = model(tokens_BT, positions_BT, states, indices)
        return model.unembed(x_BTD), states

    return run


@pytest.mark.parametrize("lengths", [LENGTHS, pytest.param((4000,), marks=pytest.mark.slow)], ids=["short", "4000"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_at_every_length(opened, family, lengths):
    directory, model = opened(family)
    rows = make_rows(lengths)
    inputs = Inputs.from_rows(rows)
    columns = np.arange(inputs.tokens.shape[1])
    expected = Reference(directory, "float64").forward(inputs, columns)["logits"]
    left, _ = logits(model, inputs.tokens, inputs.positions)
    assert np.abs(np.asarray(left) - expected)[inputs.is_real].max() <= BOUND
    tokens, positions = np.zeros_like(inputs.tokens), np.full_like(inputs.positions, -1)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], positions[index, : len(row)] = row, np.arange(len(row))
    right = np.asarray(logits(model, tokens, positions)[0])
    for index, row in enumerate(rows):
        assert np.abs(right[index, : len(row)] - np.asarray(left)[index, len(columns) - len(row) :]).max() <= BOUND


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_of_a_prompt_and_decode_equal_one_forward(opened, family, seed):
    """Chunks of 1 to 130 tokens at random, two sequences side by side, then step by step."""
    _, model = opened(family)
    rng, size, total, num_decoded = np.random.default_rng(seed), 130, 300, 4
    tokens = rng.integers(0, 311, (2, total + num_decoded), np.int32)
    whole = np.asarray(logits(model, tokens, np.tile(np.arange(total + num_decoded, dtype=np.int32), (2, 1)))[0])
    specs, pages_per_row = state_specs(model.config, "float64"), pages_for(total + num_decoded)
    with jax.enable_x64(True):
        states = empty_states(specs, 1, [2 * pages_per_row] * len(cache_groups(specs)), num_slots=2)
    done = np.zeros(2, np.int64)
    while (done < total).any():
        counts = np.minimum(rng.integers(1, size + 1, 2), total - done)
        columns = done[:, None] + np.arange(size)
        is_real = np.arange(size) < counts[:, None]
        positions = np.where(is_real, columns, -1).astype(np.int32)
        chunk = np.take_along_axis(tokens, np.minimum(columns, total - 1), axis=1)
        found, states = logits(model, chunk, positions, states, pages_per_row)
        for row in range(2):
            expected = whole[row, done[row] : done[row] + counts[row]]
            assert np.abs(np.asarray(found)[row, : counts[row]] - expected).max(initial=0) <= BOUND
        done += counts
    for step in range(total, total + num_decoded):
        found, states = logits(model, tokens[:, step : step + 1], np.full((2, 1), step, np.int32), states, pages_per_row)
        assert np.abs(np.asarray(found)[:, 0] - whole[:, step]).max() <= BOUND
