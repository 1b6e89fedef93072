"""The TPU's attention kernel, interpreted: the numbers of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops.attention import attention_in_blocks
from qwen_dist.ops.splash_attention import splash_attention
from qwen_dist.sharding import TRAIN, ShardingContext, use_sharding

B, N, K = 2, 4, 2


def inputs(length: int, head_dim: int):
    """Queries, keys, values, positions and segments: two sequences in each row, padding on both sides."""
    rng = np.random.default_rng(length)
    q, k, v = (
        rng.standard_normal(shape, np.float32)
        for shape in ((B, length, N, head_dim), (B, K, length, head_dim), (B, K, length, head_dim))
    )
    positions, segments = np.full((B, length), -1, np.int32), np.zeros((B, length), np.int32)
    for row, (start, second, end) in enumerate([(7, 60, length), (0, length // 2, length - 5)]):
        positions[row, start:second], positions[row, second:end] = np.arange(second - start), np.arange(end - second)
        segments[row, second:] = 1
    return q, k, v, positions, segments


def run(function, arrays, sliding_window):
    """The output and its gradients; the output of padding is undefined."""
    *operands, positions, segments = arrays

    def loss(*operands):
        mixed = jnp.where(positions[..., None, None] >= 0, function(*operands, positions, sliding_window, segments), 0)
        return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
    return mixed, *gradients


@pytest.mark.parametrize(
    ("length", "head_dim", "sliding_window", "mesh"),
    [(200, 128, None, ""), (130, 64, 37, "data=2"), (128, 32, None, "fsdp=2,tensor=4")],
    ids=["padded to a block", "window", "more devices than key heads"],
)
def test_the_numbers_of_the_plain_form(length, head_dim, sliding_window, mesh):
    arrays = inputs(length, head_dim)
    expected = run(attention_in_blocks, arrays, sliding_window)
    with use_sharding(ShardingContext(make_mesh(MeshConfig.parse(mesh)), TRAIN)):
        found = run(functools.partial(splash_attention, interpret=True), arrays, sliding_window)
    for name, x, y in zip(("output", "by q", "by k", "by v"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)
