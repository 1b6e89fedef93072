"""The kernels for GPUs, interpreted: the numbers of the plain forms. And which of them a GPU's features allow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerators import H100
from test_splash_attention import inputs, run

from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops import gpu
from qwen_dist.ops import grouped_matmul as grouped
from qwen_dist.ops import triton_grouped_matmul as triton_grouped
from qwen_dist.ops.attention import ATTENTION, attention_in_blocks
from qwen_dist.ops.cudnn_attention import cudnn_attention
from qwen_dist.ops.dispatch import Backend
from qwen_dist.ops.gpu import GPUFeatures
from qwen_dist.ops.gpu_matmul import rounded_matmul
from qwen_dist.ops.matmul import MATMUL
from qwen_dist.ops.paged_attention import PAGED_ATTENTION, paged_attention_in_groups
from qwen_dist.ops.paged_cache import MAX_ENTRIES, NOWHERE, PAGE, PagedState, PageIndices
from qwen_dist.ops.triton_attention import triton_attention
from qwen_dist.ops.triton_paged_attention import triton_paged_attention
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext, use_sharding


def on_mesh(mesh, rules):
    return use_sharding(ShardingContext(make_mesh(MeshConfig.parse(mesh)), rules))


# --- attention without a cache ---


def check(found, expected, tolerance):
    for name, x, y in zip(("output", "by q", "by k", "by v"), found, expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("length", "mesh"), [(150, ""), (128, "fsdp=2,tensor=4")], ids=["padded", "eight devices"])
def test_packed_rows_have_the_numbers_of_the_plain_form(length, mesh):
    arrays = inputs(length, 64)
    expected = run(attention_in_blocks, arrays, None)
    with on_mesh(mesh, TRAIN):
        found = run(functools.partial(triton_attention, interpret=True), arrays, None)
    check(found, expected, 2e-5)


@pytest.mark.parametrize(("sliding_window", "mesh"), [(None, "data=2"), (37, ""), (None, "fsdp=2,tensor=4")])
def test_rows_with_padding_on_either_side_have_the_numbers_of_the_plain_form(sliding_window, mesh):
    """By XLA's form of the function that calls cuDNN: the mask is causal by place."""
    *operands, positions, _ = inputs(130, 32)
    positions = np.full_like(positions, -1)
    positions[0, 7:], positions[1, :100] = np.arange(123), np.arange(100)
    arrays = *operands, positions, None
    expected = run(attention_in_blocks, arrays, sliding_window)
    with on_mesh(mesh, TRAIN):
        found = run(functools.partial(cudnn_attention, implementation="xla"), arrays, sliding_window)
    check(found, expected, 1e-5)


# --- pages ---


def paged_inputs(num_tokens, lengths, *, num_shards=1, N=6, K=2, H=64, seed=0):
    """Rows whose last `num_tokens` positions are queries; their pages are anywhere, the entries in no order."""
    rng = np.random.default_rng(seed)
    B, per_shard = len(lengths), len(lengths) // num_shards
    of_row = [-(-length // PAGE) for length in lengths]
    num_pages = max(sum(of_row[shard * per_shard : (shard + 1) * per_shard]) for shard in range(num_shards)) + 2
    size = -(-num_pages // MAX_ENTRIES) * MAX_ENTRIES
    row_DE, page_DE = np.zeros((2, num_shards, size), np.int32)
    start_DE = np.full((num_shards, size), NOWHERE, np.int32)
    for shard in range(num_shards):
        entries = [(row, number * PAGE) for row in range(per_shard) for number in range(of_row[shard * per_shard + row])]
        order = rng.permutation(len(entries))
        pages = rng.permutation(num_pages)[: len(entries)]
        for place, index in enumerate(order):
            row_DE[shard, place], start_DE[shard, place] = entries[index]
            page_DE[shard, place] = pages[index]
    positions = np.array([np.arange(length - num_tokens, length) for length in lengths], np.int32)
    positions[positions < 0] = -1
    pool = (num_shards, num_pages, K, PAGE, H)
    state = PagedState(*(jnp.asarray(rng.standard_normal(pool), jnp.bfloat16).view(jnp.uint16) for _ in "kv"))
    q = jnp.asarray(rng.standard_normal((B, num_tokens, N, H)), jnp.bfloat16)
    used = np.int32((start_DE < NOWHERE).sum(axis=1).max())
    return q, state, jnp.asarray(positions), PageIndices(np.zeros((B, 1)), np.zeros(B), row_DE, page_DE, start_DE, used)


@pytest.mark.parametrize(
    ("num_tokens", "lengths", "sliding_window", "mesh"),
    [
        (1, (1, 64, 700, 130), None, ""),
        (1, (300, 5), 70, "data=2,tensor=2"),
        (32, (32, 224), None, "tensor=2"),
        pytest.param(32, (32, 20, 64, 480), 100, "data=2", marks=pytest.mark.slow),
    ],
    ids=["decode", "decode with a window, on four devices", "prefill, on two devices", "prefill with a window"],
)
def test_paged_attention_has_the_numbers_of_the_plain_form(num_tokens, lengths, sliding_window, mesh):
    """A row without any page is padding; the kernel returns zeros for it."""
    num_shards = 2 if "data=2" in mesh else 1
    given = paged_inputs(num_tokens, lengths, num_shards=num_shards)
    expected = paged_attention_in_groups(*given, sliding_window)
    with on_mesh(mesh, INFERENCE):
        kernel = functools.partial(triton_paged_attention, sliding_window=sliding_window, interpret=True)
        found = jax.jit(kernel)(*given)
    is_real = np.asarray(given[2] >= 0)
    np.testing.assert_allclose(np.float32(found)[is_real], np.float32(expected)[is_real], rtol=2e-2, atol=2e-2)
    error = np.abs(np.float32(found)[is_real] - np.float32(expected)[is_real])
    assert error.mean() < 5e-4, "more than rounding differs"


def test_a_row_without_pages_gives_zeros():
    q, state, positions, pages = paged_inputs(1, (70, 70))
    pages = pages._replace(start_DE=np.where(pages.row_DE == 1, NOWHERE, pages.start_DE))
    found = jax.jit(functools.partial(triton_paged_attention, sliding_window=None, interpret=True))(
        q, state, positions, pages
    )
    assert np.any(np.asarray(found[0])) and not np.any(np.asarray(found[1]))


# --- grouped products ---


@pytest.mark.parametrize(
    ("sizes", "behind"),
    [([0, 70, 0, 33, 1, 0], 5), pytest.param([0, 7, 0, 0, 2, 0], 3, marks=pytest.mark.slow)],
    ids=["several tiles of a group", "few rows, most groups empty"],
)
def test_grouped_products_have_the_numbers_of_the_plain_form(sizes, behind):
    """More in and out than a block has, and sizes that nothing divides."""
    rng, num_rows = np.random.default_rng(0), sum(sizes)
    rows, other = (jnp.asarray(rng.standard_normal((num_rows + behind, width)), jnp.float32) for width in (70, 140))
    weights = jnp.asarray(rng.standard_normal((len(sizes), 140, 70)) / 8, jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    given = {"dtype": jnp.dtype("float32")}
    for dim, x in ((2, rows), (1, other)):
        expected = grouped._in_blocks(x, weights, sizes, dim=dim, **given)
        multiply = functools.partial(triton_grouped.rows_by_weights_in_tiles, dim=dim, interpret=True, **given)
        found = jax.jit(multiply)(x, weights, sizes)
        np.testing.assert_allclose(found[:num_rows], expected[:num_rows], rtol=1e-5, atol=1e-5)
    expected = grouped._rows_by_rows_in_blocks(other, rows, sizes)
    found = jax.jit(functools.partial(triton_grouped.rows_by_rows_in_tiles, interpret=True))(other, rows, sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40)])
def test_products_that_round_inside_have_the_numbers_of_the_plain_form(shape):
    """A sum over rows of bfloat16 numbers; what differs is at most the last bit."""
    rng, dtype = np.random.default_rng(0), jnp.dtype(jnp.bfloat16)
    x, weight, towards = (jnp.asarray(rng.standard_normal(size), dtype) for size in (shape, (24, 40), (*shape[:-1], 24)))
    assert MATMUL.select(Backend.GPU, x, weight, dtype).name == "rounded inside"
    assert MATMUL.select(Backend.GPU, x, weight, jnp.dtype(jnp.float32)) is MATMUL.plain
    results = []
    for multiply in (rounded_matmul, MATMUL.plain.run):
        product, pull_back = jax.vjp(lambda x, weight, multiply=multiply: multiply(x, weight, dtype), x, weight)
        results.append((product, *pull_back(towards)))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=8e-3, atol=8e-3)


# --- which of them a GPU's features allow ---

FEATURES = {
    "H100": H100,
    "A100": GPUFeatures(gpu.AMPERE, 91_000, has_triton=True),
    "A100 without cuDNN": GPUFeatures(gpu.AMPERE, 0, has_triton=True),
    "without Triton": GPUFeatures(gpu.HOPPER, 91_000, has_triton=False),
    "V100": GPUFeatures((7, 0), 91_000, has_triton=True),
    "none": gpu.NO_GPU,
}
CHOSEN = {  # of rows of one sequence with heads of 128 and of 256, of packed rows, of pages, of experts
    "H100": ("cudnn", "cudnn", "triton", "triton", "triton"),
    "A100": ("cudnn", "triton", "triton", "triton", "triton"),
    "A100 without cuDNN": ("triton", "triton", "triton", "triton", "triton"),
    "without Triton": ("cudnn", "cudnn", "plain", "plain", "plain"),
    "V100": ("plain", "plain", "plain", "plain", "plain"),
    "none": ("plain", "plain", "plain", "plain", "plain"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_form_is_chosen_by_the_features_of_the_gpu(name, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_features", lambda: FEATURES[name])

    def attention(dtype, head_dim, segments=None):
        q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 128, 4, head_dim), (2, 2, 128, head_dim)))
        return ATTENTION.select(Backend.GPU, q, k, k, None, None, segments).name

    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    x, weights = jax.ShapeDtypeStruct((9, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4, 32, 64), jnp.bfloat16)
    of_experts = grouped.ROWS_BY_WEIGHTS.select(Backend.GPU, x, weights, None, dim=2, dtype=x.dtype).name
    paged = PAGED_ATTENTION.select(Backend.GPU, *paged_inputs(1, (3,)), None).name
    forms = attention("bfloat16", 128), attention("bfloat16", 256), attention("bfloat16", 64, segments), paged, of_experts
    assert forms == CHOSEN[name]
    assert attention("float32", 128) == attention("bfloat16", 40, segments) == "plain"
