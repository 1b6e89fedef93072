"""Grouped matrix products against a plain loop over the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.ops import grouped_matmul as grouped
from qwen_dist.ops.grouped_matmul import grouped_matmul

C, O = 12, 10
# rows of each group, and rows after the last one, which belong to none
GROUPS = {
    "about even": ([3, 5, 4, 6], 0),
    "two to four each": ([3, 12, 2, 0, 1], 0),
    "as many, in few": ([0, 0, 12, 0, 0], 2),
    "some empty": ([0, 7, 0, 0, 2, 0], 3),
    "all in one": ([0, 0, 200, 0], 1),
    "few rows, many groups": ([0] * 9 + [1] + [0] * 20 + [2] + [0] * 9, 0),
    "none at all": ([0, 0, 0], 4),
    "more than a block each": ([130, 64, 65, 1], 5),
}


def make(name, dtype):
    sizes, behind = GROUPS[name]
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((sum(sizes) + behind, C)), dtype)
    weights = jnp.asarray(rng.standard_normal((len(sizes), O, C)), dtype)
    return rows, weights, jnp.asarray(sizes, jnp.int32)


def loop(rows, weights, sizes, dtype):
    """The twin: one product after the other."""
    sizes = np.asarray(sizes)
    ends = np.cumsum(sizes)
    parts = [
        jnp.dot(rows[end - size : end], weight.T, preferred_element_type=jnp.promote_types(dtype, jnp.float32))
        for weight, size, end in zip(weights, sizes, ends, strict=True)
    ]
    return jnp.concatenate(parts).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GROUPS)
def test_it_is_the_loop(name, dtype):
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-2}[dtype]
    with jax.enable_x64(dtype == "float64"):
        rows, weights, sizes = make(name, dtype)
        expected = jax.jit(lambda rows, weights: loop(rows, weights, sizes, jnp.dtype(dtype)))(rows, weights)
        found = jax.jit(functools.partial(grouped_matmul, dtype=jnp.dtype(dtype)))(rows, weights, sizes)
        assert found.dtype == expected.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(
            np.float64(found[: len(expected)]), np.float64(expected), rtol=tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_are_the_loops(name):
    with jax.enable_x64(True):
        rows, weights, sizes = make(name, "float64")
        towards = jnp.asarray(np.random.default_rng(1).standard_normal((int(sizes.sum()), O)))

        def loss(multiply, rows, weights):
            return jnp.vdot(multiply(rows, weights, sizes, jnp.dtype("float64"))[: len(towards)], towards)

        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, multiply), (0, 1)))(rows, weights)
            for multiply in (grouped_matmul, loop)
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", GROUPS)
def test_the_form_for_accelerators_computes_the_same(name):
    """`ragged_dot` runs here too, only slowly."""
    with jax.enable_x64(True):
        rows, weights, sizes = make(name, "float64")
        num_rows = int(sizes.sum())
        other = jnp.asarray(np.random.default_rng(1).standard_normal((len(rows), O)))
        wide = jnp.dtype("float64")
        for dim, x in ((2, rows), (1, other)):
            found, expected = (each(x, weights, sizes, dim=dim, dtype=wide) for each in (grouped._ragged, grouped._on_cpu))
            np.testing.assert_allclose(found[:num_rows], expected[:num_rows], rtol=1e-13, atol=1e-13)
        found, expected = (
            each(other, rows, sizes) for each in (grouped._rows_by_rows_ragged, grouped._rows_by_rows_in_blocks)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "num_out", "num_in"),
    [
        ("some empty", 192, grouped.TILE + 64),
        ("some empty", 8, 256),
        pytest.param("more than a block each", 192, grouped.TILE + 64, marks=pytest.mark.slow),
        pytest.param("more than a block each", 256, 8, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_for_tpus_computes_the_same(name, num_out, num_in):
    """Interpreted, with more in and out than a tile has, and with fewer than it has lanes, as an adapter's rank."""
    sizes, behind = GROUPS[name]
    rng, num_rows = np.random.default_rng(0), sum(sizes)
    rows, other = (jnp.asarray(rng.standard_normal((num_rows + behind, width)), jnp.float32) for width in (num_in, num_out))
    weights = jnp.asarray(rng.standard_normal((len(sizes), num_out, num_in)) / 32, jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    given = {"dtype": jnp.dtype("float32")}
    for dim, x in ((2, rows), (1, other)):
        expected = grouped._in_blocks(x, weights, sizes, dim=dim, **given)
        found = grouped.rows_by_weights_in_tiles(x, weights, sizes, dim=dim, interpret=True, **given)
        np.testing.assert_allclose(found[:num_rows], expected[:num_rows], rtol=1e-5, atol=1e-5)
    expected = grouped._rows_by_rows_in_blocks(other, rows, sizes)
    found = grouped.rows_by_rows_in_tiles(other, rows, sizes, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
