"""The gated delta rule: transformers' own functions are the truth; chunks, steps, segments and padding agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from delta_rule_steps import random_inputs, steps
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from qwen_dist.ops.delta_rule import (
    DeltaInputs,
    delta_rule,
    delta_rule_plain,
    delta_rule_prepared,
    unit_lower_inverse,
)

# Compiled once for each of a few sizes.
rule = jax.jit(delta_rule)


def torch_truth(inputs: DeltaInputs, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """Run transformers' step form in float64: it casts to float32 by name, which is float64 here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    q, k, v, g, beta = (torch.from_numpy(np.asarray(x, np.float64)) for x in inputs)
    B, T, G, R, V = v.shape
    heads = v.reshape(B, T, G * R, V), g.reshape(B, T, G * R), beta.reshape(B, T, G * R)
    o, state = torch_recurrent_gated_delta_rule(q, k, *heads, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return o.numpy().reshape(B, T, G, R, V), state.numpy().reshape(B, G, R, -1, V)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("T", "G", "R", "K", "V"),
    [(T, 2, 3, 16, 8) for T in (1, 31, 64, 200)] + [(T, 1, 1, 8, 24) for T in (2, 65)],
)
def test_it_equals_transformers(T, G, R, K, V, monkeypatch):
    inputs = random_inputs(np.random.default_rng(T), 2, T, G, R, K, V)
    o, state = torch_truth(inputs, monkeypatch)
    for got_o, got_state in (rule(inputs), steps(inputs, np.zeros((2, G, R, K, V)))):
        np.testing.assert_allclose(got_o, o, atol=1e-12)
        np.testing.assert_allclose(got_state, state, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1.0, 1000.0]),
    st.booleans(),
)
def test_packed_sequences_with_padding_equal_each_alone(lengths, seed, gate, has_equal_keys):
    rng = np.random.default_rng(seed)
    gaps = rng.integers(0, 9, len(lengths) + 1)
    total = sum(lengths) + int(gaps.sum())
    total = next(size for size in (128, 448) if size >= total)  # two programs
    whole = jax.tree.map(np.zeros_like, random_inputs(rng, 1, total, 1, 2, 8, 8))
    segments, start, alone = np.zeros((1, total), np.int32), int(gaps[0]), []
    for number, length in enumerate(lengths):
        part = random_inputs(rng, 1, length, 1, 2, 8, 8, gates=(gate,))
        if has_equal_keys:
            part = part._replace(k_BTGK=np.broadcast_to(part.k_BTGK[:, :1], part.k_BTGK.shape))
        place = slice(start, start + length)
        for x, one in zip(whole, part, strict=True):
            x[:, place] = one
        segments[:, start:] = number
        alone.append((place, *steps(part, np.zeros((1, 1, 2, 8, 8)))))
        start += length + int(gaps[number + 1])
    o, state = rule(whole, None, segments)
    for place, one, _ in alone:
        np.testing.assert_allclose(o[:, place], one, atol=1e-11)
    np.testing.assert_allclose(state, alone[-1][2], atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 31, 64, 70]), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_any_split_gives_the_same(lengths, seed):
    rng = np.random.default_rng(seed)
    inputs = random_inputs(rng, 1, sum(lengths), 2, 1, 8, 4)
    state = rng.standard_normal((1, 2, 1, 8, 4))
    o, end = steps(inputs, state)
    position = 0
    for length in lengths:
        part = slice(position, position + length)
        some, state = rule(jax.tree.map(lambda x: x[:, part], inputs), state)  # noqa: B023
        np.testing.assert_allclose(some, o[:, part], atol=1e-11)
        position += length
    np.testing.assert_allclose(state, end, atol=1e-11)


@jax.jit
@jax.grad
def gradient_of_chunks(inputs):
    return jnp.sum(delta_rule(inputs)[0] ** 2)


@jax.jit
@jax.grad
def gradient_of_steps(inputs):
    def step(state, token):
        o, state = delta_rule(jax.tree.map(lambda x: x[:, None], token), state)
        return state, o

    by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), inputs)
    return jnp.sum(jax.lax.scan(step, jnp.zeros((1, 1, 2, 8, 8)), by_token)[1] ** 2)


@pytest.mark.parametrize("gate", [0.0, 1000.0])
def test_gradients_are_finite_and_those_of_the_steps(gate):
    inputs = random_inputs(np.random.default_rng(0), 1, 70, 1, 2, 8, 8, gates=(gate,))
    for x in inputs:
        x[:, 5] = 0  # padding: zero keys, too
    for x, expected in zip(gradient_of_chunks(inputs), gradient_of_steps(inputs), strict=True):
        assert jnp.isfinite(x).all()
        np.testing.assert_allclose(x, expected, atol=1e-9)


def test_prepared_together_or_one_after_the_other_is_the_same():
    inputs = random_inputs(np.random.default_rng(1), 2, 150, 2, 2, 8, 4)
    segments, start = np.sort(np.arange(300).reshape(2, 150) * 7 % 4), np.ones((2, 2, 2, 8, 4))

    def value_and_gradients(form):
        def total(inputs, start):
            o, end = form(inputs, start, segments)
            return jnp.sum(o**2) + jnp.sum(end**2), (o, end)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(inputs, start)

    one, other = (jax.tree.leaves(value_and_gradients(form)) for form in (delta_rule_plain, delta_rule_prepared))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_training_holds_the_arrays_of_one_chunk():
    """Besides the inputs, the outputs and the state before each chunk. Preparing all chunks together takes more memory."""
    shapes = [(1, 4096, 1, 64)] * 2 + [(1, 4096, 1, 2, 64), *[(1, 4096, 1, 2)] * 2]
    inputs = DeltaInputs(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

    def temporaries(form):
        gradient = jax.jit(jax.grad(lambda inputs: jnp.sum(form(inputs)[0] ** 2)))
        return gradient.lower(inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(delta_rule_plain) < 0.4 * temporaries(delta_rule_prepared)


@pytest.mark.parametrize("period", [1, 2])
def test_the_inverse_is_accurate_where_keys_repeat(period):
    """Sums of powers of L have errors of 1 to 1e8 here."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((period, 16))
    keys = np.resize(keys / np.linalg.norm(keys, axis=1, keepdims=True), (64, 16))
    lower = np.tril(keys @ keys.T, -1)
    exact = np.linalg.inv(np.eye(64) + lower)
    got = np.asarray(jax.jit(unit_lower_inverse)(jnp.asarray(lower, jnp.float32)))
    assert np.abs(got - exact).max() <= 1e-6 * np.abs(exact).max()


def test_float32_keeps_its_digits_where_gates_add_up():
    """Some tokens forget everything and the others little: differences of the gates' sums from the start lose digits."""
    inputs = random_inputs(np.random.default_rng(0), 1, 128, 1, 2, 16, 8, gates=(0.01,))
    inputs.g_BTGR[:, ::16] = -300
    exact = steps(inputs, np.zeros((1, 1, 2, 16, 8)))
    got = rule(jax.tree.map(np.float32, inputs))
    for ours, truth in zip(got, exact, strict=True):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - truth) < 5e-7 * np.linalg.norm(truth)
