"""Keys and values in pages: the forms of writing them put the same numbers at the same places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops.dispatch import Backend
from qwen_dist.ops.paged_cache import PAGE, WRITE
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=2", "tensor=8"], ids=["one device", "four", "more than key heads"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_rows_are_written_where_the_plain_form_writes(mesh, num_shards):
    """Tokens of a page that does not exist are padding and are left out."""
    rng, P, X, K, H = np.random.default_rng(0), 5, 7, 2, 16
    pool = jnp.asarray(rng.integers(0, 2**16, (num_shards, P, K, PAGE, H)), jnp.uint16)
    new = jnp.asarray(rng.integers(0, 2**16, (num_shards, X, K, H)), jnp.uint16)
    page = jnp.asarray(np.stack([rng.permutation([0, 0, 4, 2, P, P, 3]) for _ in range(num_shards)]), jnp.int32)
    offset = jnp.asarray(np.stack([rng.permutation(PAGE)[:X] for _ in range(num_shards)]), jnp.int32)
    given = pool, new, page, offset
    expected = WRITE.plain.run(*given)
    with use_sharding(ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)):
        chosen = WRITE.select(Backend.TPU, *given)
        fits = num_shards == (2 if "data" in mesh else 1)
        assert chosen.name == ("rows" if fits else "plain")
        np.testing.assert_array_equal(jax.jit(chosen.run)(*given), expected)
    assert (np.asarray(expected) != np.asarray(pool)).any()
