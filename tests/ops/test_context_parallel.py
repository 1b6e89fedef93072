"""Attention with the tokens of a row split over devices: the same numbers, and each device does its part of the work."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops.attention import QUERY_BLOCK, attention
from qwen_dist.planning.compile import parse_collectives
from qwen_dist.sharding import TRAIN, ShardingContext, use_sharding

B, N, K, H = 2, 4, 2, 16


def inputs(length: int):
    rng = np.random.default_rng(length)
    q, k, v = (
        rng.standard_normal(shape, np.float32) for shape in ((B, length, N, H), (B, K, length, H), (B, K, length, H))
    )
    positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
    positions[1] -= 5  # padding on the left
    return q, k, v, positions


def on_mesh(text: str, arrays, **options):
    """Output and gradients by q, k and v of attention under the training rules, and the compiled program."""
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(text)), TRAIN)
    names = (
        ("batch", "length", "q_heads", "head_dim"),
        *(("batch", "kv_heads", "length", "head_dim"),) * 2,
        ("batch", "length"),
    )
    placed = [jax.device_put(x, sharding_ctx.activation("x", x.shape, axes)) for x, axes in zip(arrays, names, strict=True)]

    def output(q, k, v, positions):
        with use_sharding(sharding_ctx):
            return attention(q, k, v, positions, **options)

    def loss(*operands):
        mixed = output(*operands)
        is_token = operands[-1] >= 0  # what padding gets is nobody's, and depends on the blocks
        return (mixed * mixed).sum(where=is_token[..., None, None]), mixed

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(*placed).compile()
    (_, mixed), gradients = run(*placed)
    return mixed, gradients, run


@pytest.mark.parametrize(
    ("mesh", "length", "options"),
    [
        ("context=8", 8, {}),
        ("data=2,context=2,tensor=2", 240, {"segments_BT": np.repeat([[0, 1, 2], [0, 1, 1]], 80, axis=1)}),
        ("context=4", QUERY_BLOCK * 4 + 120, {"sliding_window": 37}),
    ],
    ids=["short", "segments", "blocks and window"],
)
def test_the_numbers_of_one_device(mesh, length, options):
    arrays = inputs(length)
    expected, expected_gradients, _ = on_mesh("", arrays, **options)
    mixed, gradients, _ = on_mesh(mesh, arrays, **options)
    seen = arrays[3] >= 0
    np.testing.assert_allclose(np.asarray(mixed)[seen], np.asarray(expected)[seen], rtol=2e-6, atol=2e-6)
    for ours, one in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, one, rtol=2e-5, atol=2e-5)


def test_each_device_has_its_part_of_the_queries_and_of_the_work():
    arrays = inputs(512)
    _, _, alone = on_mesh("", arrays)
    mixed, gradients, split = on_mesh("context=4", arrays)
    rows = NamedSharding(mixed.sharding.mesh, P(None, "context"))
    assert mixed.sharding.is_equivalent_to(rows, mixed.ndim)
    assert gradients[0].sharding.is_equivalent_to(rows, mixed.ndim)
    # Alone, blocks of queries skip the keys after them: 10 of 16 tiles. Split, a device has 4 of the 16.
    assert split.cost_analysis()["flops"] == pytest.approx(alone.cost_analysis()["flops"] * 4 / 10, rel=0.1)
    gathered = [one for one in parse_collectives(split.as_text()) if one.kind == "all-gather"]
    assert max(elements for one in gathered for elements, _ in one.arrays) == B * K * 512 * H  # keys or values; no queries
