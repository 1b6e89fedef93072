"""The comparison catches every mutation and names the component that was broken."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutations import MUTATIONS, SCENARIOS, STATE_MUTATIONS, Bench
from native_kernels import needs_kernels

from qwen_dist.checkpoint.model import load_model
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.sharding import TRAIN, ShardingContext

every_mutation = pytest.mark.parametrize(
    "mutation",
    [pytest.param(one, marks=needs_kernels if one.scenario == "kernels" else ()) for one in MUTATIONS],
    ids=lambda mutation: mutation.what.replace(" ", "_"),
)


@pytest.fixture(scope="module")
def bench(tiny_checkpoint):
    return functools.lru_cache(lambda scenario: Bench(scenario, tiny_checkpoint))


@pytest.fixture(scope="module")
def table():
    """Lines collected by the tests, printed (under -s) when all are through."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join([f"{'mutation':46} {'named':32} off by", *lines]))


@every_mutation
def test_mutation_applies(mutation):
    """In the default run too, so that a mutation follows the function that it edits."""
    with mutation.applied():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_mutation_nothing_is_beyond(bench, scenario):
    assert bench(scenario).first_failure() is None


@pytest.mark.slow
@every_mutation
def test_mutation_is_caught_and_named(bench, table, mutation):
    with mutation.applied():
        failure = bench(mutation.scenario).first_failure()
    table.append(
        f"{mutation.what:46} {failure.name if failure else 'NOT CAUGHT':32} {failure.measured if failure else 0:.2g}"
    )
    assert failure is not None, f"{mutation.what} was not caught"
    assert failure.name == mutation.named, str(failure)


@pytest.fixture(scope="module")
def packed_error(tiny_checkpoint):
    """A function → the largest difference of the hidden states of three packed sequences from those of each alone."""
    directory = tiny_checkpoint("qwen3_5", num_hidden_layers=2)
    lengths, rng = (70, 1, 33), np.random.default_rng(0)
    rows = [rng.integers(0, 311, (1, length), np.int32) for length in lengths]

    def error():
        with jax.enable_x64(True):
            loaded = load_model(directory, ShardingContext(make_mesh(MeshConfig.parse("")), TRAIN), dtype="float64")
            model = with_parameters(loaded.module, loaded.parameters)
            alone = [model(row, np.arange(row.shape[1], dtype=np.int32)[None])[0] for row in rows]
            positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])[None]
            segments = jnp.asarray(np.repeat(np.arange(3, dtype=np.int32), lengths)[None])
            together, *_ = model(np.concatenate(rows, axis=1), positions, segments_BT=segments)
            return float(jnp.abs(together - jnp.concatenate(alone, axis=1)).max())

    return error


@pytest.fixture(scope="module")
def engine_answers(tiny_directory):
    """A function → the answers of a new engine with a single slot to prompts one after the other, of several chunks, and
    so short that what the slot held is not forgotten; or with two slots to all of them together."""
    options = ModelOptions(str(tiny_directory("qwen3_5", num_hidden_layers=2)), dtype="float32")

    def answers(num_slots):
        engine, _, params = open_engine(options, "", SamplingOptions(temperature=0.0), max_batch_size=num_slots)
        lengths = (3 * PAGE + 1, 2, 3, 3 * PAGE, 1)
        prompts = [tuple((n + 7 * i) % 300 for i in range(length)) for n, length in enumerate(lengths)]
        # Of several lengths, so that some decode while others begin.
        params = [dataclasses.replace(params, max_new_tokens=5 + 2 * n) for n in range(len(lengths))]
        requests = list(map(Request, range(len(lengths)), prompts, params))
        runs = [requests] if num_slots > 1 else [[request] for request in requests]
        found: list[list[int]] = [[] for _ in requests]
        for update in (update for some in runs for update in engine.run(some)):
            found[update.request.key] += update.tokens
        return found

    return answers


@pytest.mark.slow
def test_packed_sequences_of_a_hybrid_equal_each_alone(packed_error):
    assert packed_error() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("mutation", STATE_MUTATIONS, ids=lambda mutation: mutation.what.replace(" ", "_"))
def test_states_that_meet_are_caught(packed_error, engine_answers, mutation):
    num_slots = {"engine": 1, "mixed": 2}.get(mutation.named)
    expected = None if num_slots is None else engine_answers(num_slots)
    with mutation.applied():
        if mutation.named == "packed":
            assert packed_error() > 1e-6
        else:
            assert engine_answers(num_slots) != expected
