"""The C++ kernels against the plain forms of their operations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_kernels import EXPECTED, needs_kernels

from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models import moe
from qwen_dist.models.parameters import with_parameters
from qwen_dist.ops import native, native_library
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule_in_slots
from qwen_dist.ops.experts import ExpertWeights, can_experts_kernel, experts_kernel, experts_plain
from qwen_dist.ops.grouped_weight import GroupedFormat
from qwen_dist.ops.matmul import matmul
from qwen_dist.ops.paged_attention import paged_attention_in_groups
from qwen_dist.ops.paged_cache import MAX_ENTRIES, PAGE, PagedState, PageIndices, quantize
from qwen_dist.ops.rotary import rotate, rotate_plain
from qwen_dist.ops.short_convolution import SHORT_CONVOLUTION, short_convolution
from qwen_dist.ops.slots import SlotRows
from qwen_dist.ops.swiglu import SWIGLU, swiglu
from qwen_dist.sharding import INFERENCE, TRAIN, LocalShard, ShardingContext, use_sharding

pytestmark = [needs_kernels, pytest.mark.usefixtures("cpu_build")]

# Of numbers about as large as 1, or a sum's share of them.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.6e-2}
# Number by number: of bfloat16, a unit in the last place where XLA rounds otherwise.
CLOSE = {"float32": {"rtol": 4e-7, "atol": 1e-6}, "bfloat16": {"rtol": 2**-7, "atol": 1e-6}}


def test_they_were_compiled(cpu_build):
    assert native_library.is_available() and native_library.active_build() == cpu_build
    assert native_library.available_builds() == tuple(EXPECTED)


def normal(shape, dtype, seed=0):
    """Return a NumPy array: arithmetic with it compiles nothing."""
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=2)
def product(x, weight, dtype):
    return native.matmul(x, weight, dtype)


@functools.partial(jax.jit, static_argnums=2)
def product_wide_and_rounded(x, weight, dtype):
    return native.matmul(x, weight, jnp.float32), native.matmul(x, weight, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [16, 72, 896])
@pytest.mark.parametrize("outputs", [4, 7, 130])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 150])
def test_matmul(rows, outputs, inputs, dtype):
    x, weight = normal((rows, inputs), dtype), normal((outputs, inputs), dtype, 1) * np.asarray(inputs**-0.5, dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    wide, rounded = map(np.asarray, product_wide_and_rounded(x, weight, dtype))
    assert (wide.dtype, rounded.dtype) == (np.float32, jnp.dtype(dtype))
    np.testing.assert_allclose(wide, expected, atol=3e-6, rtol=0)
    np.testing.assert_array_equal(rounded, wide.astype(rounded.dtype))  # once, as XLA rounds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups(dtype):
    sizes = [0, 7, 1, 0, 64, 3]
    rows, weights = normal((sum(sizes) + 2, 40), dtype), normal((len(sizes), 12, 40), dtype, 1)
    out = np.asarray(native.grouped_matmul(rows, weights, jnp.asarray(sizes), jnp.float32))
    ends = np.cumsum(sizes)
    for weight, size, end in zip(weights, sizes, ends, strict=True):
        np.testing.assert_array_equal(
            out[end - size : end], product(rows[end - size : end], weight, jnp.float32) if size else out[:0]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [200, 2048])  # of the latter many rows are put further apart
def test_a_row_does_not_depend_on_its_neighbours(inputs, dtype):
    x, weight = normal((40, inputs), dtype), normal((33, inputs), dtype, 1)
    together = product(x, weight, jnp.float32)
    for rows in (1, 3, 11):
        alone = np.concatenate([product(x[i : i + rows], weight, jnp.float32) for i in range(0, 40, rows)])
        np.testing.assert_array_equal(alone, together)


def layer_of_experts(dtype, num_experts=5, embed=20, mlp=12, tokens=50, choices=3):
    """Tokens, the numbers of their experts (one in nine is none) and scores, and the experts; loads are uneven."""
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :choices]
    chosen = np.where(
        rng.random(chosen.shape) < 1 / 9, num_experts, np.where(rng.random((tokens, 1)) < 0.7, chosen, np.arange(choices))
    )
    x, scores = normal((2, tokens // 2, embed), dtype), normal((2, tokens // 2, choices), "float32", 1)
    weights = [
        normal((num_experts, *shape), dtype, seed) * np.asarray(shape[1] ** -0.5, dtype)
        for seed, shape in ((2, (2 * mlp, embed)), (3, (embed, mlp)))
    ]
    arrays = x, chosen.reshape(scores.shape), scores
    return *map(jnp.asarray, arrays), *(ExpertWeights(jnp.asarray(weight)) for weight in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"embed": 2048, "mlp": 1024}, {"tokens": 2}, {"num_experts": 60, "mlp": 76}])
def test_experts(sizes, dtype):
    operands = layer_of_experts(dtype, **sizes)
    shard = LocalShard()
    assert can_experts_kernel(shard, *operands)
    kernel, plain = (jax.jit(functools.partial(run, shard)) for run in (experts_kernel, experts_plain))
    mixed, each = kernel(*operands)
    plain_mixed, plain_each = plain(*operands)
    assert mixed.dtype == each.dtype == dtype
    for out, plain in ((mixed, plain_mixed), (each, plain_each)):
        out, plain = (np.asarray(y, np.float32) for y in (out, plain))
        np.testing.assert_allclose(out, plain, atol=TOLERANCE[dtype] * np.abs(plain).max(), rtol=0)
    is_none = np.asarray(operands[1]) == len(operands[3])
    assert (np.asarray(each, np.float32)[is_none] == 0).all()
    for first in (0, 7 % operands[0][..., 0].size):  # alone it is the same
        some = [x.reshape(-1, x.shape[-1])[None, first : first + 3] for x in operands[:3]]
        alone, each_alone = kernel(*some, *operands[3:])
        np.testing.assert_array_equal(alone[0], mixed.reshape(-1, mixed.shape[-1])[first : first + 3])
        np.testing.assert_array_equal(each_alone[0], each.reshape(-1, *each.shape[-2:])[first : first + 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swiglu(dtype):
    gate, up = normal((3, 5, 1337), dtype) * np.asarray(8, dtype), normal((3, 5, 1337), dtype, 1)
    gate[0, 0, :4] = [-1e4, -89, 89, 1e4]
    out, plain = native.swiglu(jnp.asarray(gate), jnp.asarray(up)), SWIGLU.plain.run(gate, up)
    assert out.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, plain)), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 80, 12])
def test_rotation(width, dtype):
    x = normal((2, 700, 3, width), dtype)
    angles = jnp.arange(1400, dtype=jnp.float32).reshape(2, 700, 1) * 0.9 ** jnp.arange(width // 2)
    out, plain = (run(x, jnp.cos(angles), jnp.sin(angles)) for run in (native.rotate, rotate_plain))
    assert out.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (out, plain)), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "taps"), [((3, 1, 2, 33), 4), ((2, 32, 3, 40), 4), ((1, 2, 1, 16), 8), ((2, 5, 2, 7), 1)]
)
def test_short_convolution(shape, taps, dtype):
    x, weight = normal(shape, dtype), normal((*shape[2:], taps), dtype, 1)
    before = normal((shape[0], taps - 1, *shape[2:]), dtype, 2)
    arguments = x, before, weight, None
    assert native.can_short_convolution(*arguments)
    out, plain = native.short_convolution(*arguments), SHORT_CONVOLUTION.plain.run(*arguments)
    assert out.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (out, plain)), **CLOSE[dtype])
    tokens = jnp.concatenate([before, x], axis=1)
    for t in range(shape[1]):  # a token alone, with those before it
        alone = native.short_convolution(x[:, t : t + 1], tokens[:, t : t + taps - 1], weight, None)
        np.testing.assert_array_equal(alone[:, 0], out[:, t])


def pages_of(lengths, num_queries, window, seed=0):
    """Pages in any order in a pool, as rows of these lengths look at them, and the positions of their last queries."""
    rng = np.random.default_rng(seed)
    entries = [
        (row, start)
        for row, length in enumerate(lengths)
        for start in range(0, length, PAGE)
        if window is None or start + PAGE > length - num_queries - window
    ]
    page = rng.permutation(len(entries) + 3)[: len(entries)]
    order = rng.permutation(len(entries))
    rows, starts = (np.array(x, np.int32)[order] for x in zip(*entries, strict=True))
    padded = [np.full(-(-len(entries) // MAX_ENTRIES) * MAX_ENTRIES, fill, np.int32) for fill in (0, 0, 2**30)]
    for to, what in zip(padded, (rows, page[order], starts), strict=True):
        to[: len(entries)] = what
    positions = np.array([[length - num_queries + t for t in range(num_queries)] for length in lengths], np.int32)
    row_E, page_E, start_E = padded
    pages = PageIndices(np.zeros((1, 1)), np.zeros(1), row_E[None], page_E[None], start_E[None], np.int32(len(entries)))
    return pages, np.where(positions < 0, -1, positions), len(entries) + 3


HEADS = [((14, 2), 64), ((4, 4), 128), ((6, 1), 16), ((8, 2), 80)]


def _attention_cases():
    for case in itertools.product(HEADS, (None, "int8"), (1, 32), (None, 70), ("float32", "bfloat16")):
        (heads, width), cache_dtype, num_queries, window, dtype = case
        is_usual = (heads, width) == HEADS[0] or (num_queries, window) == (32, 70)
        marks = () if is_usual else pytest.mark.slow
        yield pytest.param(heads, width, cache_dtype, num_queries, window, dtype, marks=marks)


@pytest.mark.parametrize(("heads", "width", "cache_dtype", "num_queries", "window", "dtype"), list(_attention_cases()))
def test_attention(heads, width, cache_dtype, num_queries, window, dtype):
    pages, positions, num_pages = pages_of([1, 64, 65, 300, 5], num_queries, window)
    q = normal((len(positions), num_queries, heads[0], width), dtype)
    pools = [normal((1, num_pages, heads[1], PAGE, width), dtype, seed) for seed in (1, 2)]
    cache = PagedState(*(pool.view(jnp.uint16) if dtype == "bfloat16" else pool for pool in pools))
    if cache_dtype == "int8":
        (k, k_scale), (v, v_scale) = (jax.jit(quantize, static_argnums=1)(pool, jnp.int8) for pool in pools)
        cache = PagedState(k, v, k_scale, v_scale)
    arguments = q, cache, jnp.asarray(positions), pages, window
    assert native.can_paged_attention(*arguments)
    attention = jax.jit(native.paged_attention, static_argnums=4)
    out = np.asarray(attention(*arguments))
    plain = jax.jit(paged_attention_in_groups, static_argnums=4)(*arguments)
    is_real = positions >= 0  # the others are padding, of which nobody looks at what comes out
    out_of_real, plain_of_real = (np.asarray(x, np.float32)[is_real] for x in (out, plain))
    np.testing.assert_allclose(out_of_real, plain_of_real, atol=TOLERANCE[dtype], rtol=0)
    for row in (0, 2, 3):  # one token, a page and one token, several pages
        mine = np.flatnonzero(pages.row_DE[0, : int(pages.num_entries)] == row)
        one = pages._replace(
            row_DE=np.zeros((1, len(mine)), np.int32), page_DE=pages.page_DE[:, mine], start_DE=pages.start_DE[:, mine],
            num_entries=np.int32(len(mine)),
        )  # fmt: skip
        for first in sorted({0, num_queries // 11 * 11}):
            part = slice(first, first + 11)
            query, position = q[row : row + 1, part], jnp.asarray(positions[row : row + 1, part])
            alone = attention(query, cache, position, one, window)
            np.testing.assert_array_equal(alone[0], out[row, part])


def quantized_weight(shape):
    form = GroupedFormat("int4", shape[-1], 32, "float32", "float32")
    tensors = form.tensors(shape, "float32", ("mlp", "embed"))
    return form.assemble({suffix: jnp.ones(spec.shape, spec.dtype) for suffix, spec in tensors.items()})


def program_with(kernel):
    """A function of arrays in which inference on one CPU uses the kernel, and the arrays."""
    if kernel == native.EXPERTS:
        module = moe.Experts(num_experts=4, embed=64, mlp=32, dtype=jnp.float32, std=0.02)
        weights = {"gate_up_proj": jnp.ones((4, 2, 32, 64)), "down_proj": jnp.ones((4, 64, 32))}
        choices = jnp.ones((2, 2, 1), jnp.int32), jnp.ones((2, 2, 1))
        return lambda weights, *arrays: with_parameters(module, weights)(*arrays), (weights, jnp.ones((2, 2, 64)), *choices)
    if kernel == native.SHORT_CONVOLUTION:
        arrays = jnp.ones((1, 2, 3, 8)), jnp.ones((1, 3, 3, 8)), jnp.ones((3, 8, 4))
        return lambda *arrays: short_convolution(*arrays, None), arrays
    if kernel == native.DELTA_RULE_IN_SLOTS:
        keys, ones = jnp.ones((2, 3, 1, 8)), jnp.ones((2, 3, 1, 1))
        rows = SlotRows(jnp.array([0, 1]), jnp.array([True, False]))
        arrays = (DeltaInputs(keys, keys, jnp.ones((2, 3, 1, 1, 8)), -ones, ones), jnp.ones((1, 2, 1, 1, 8, 8)), rows)
        return lambda *arrays: delta_rule_in_slots(*arrays), arrays
    return {
        native.GROUPED_MATMUL: (lambda x, weight: matmul(x, weight), (jnp.ones((3, 64)), jnp.ones((8, 64)))),
        native.QUANTIZED_MATMUL: (lambda x, weight: matmul(x, weight), (jnp.ones((3, 64)), quantized_weight((8, 64)))),
        native.SWIGLU: (lambda gate, up: swiglu(gate, up), (jnp.ones((3, 64)),) * 2),
        native.ROTATE: (lambda x, *angles: rotate(x, *angles), (jnp.ones((1, 2, 3, 8)), *(jnp.ones((1, 2, 4)),) * 2)),
    }[kernel]


@pytest.mark.parametrize("kernel", [name for name in native.TARGETS if name != native.PAGED_ATTENTION])
def test_where_they_are_used(kernel, monkeypatch):
    program, arrays = program_with(kernel)

    def is_used(devices, rules=INFERENCE):
        with use_sharding(ShardingContext(make_mesh(MeshConfig(data=devices), jax.devices()[:devices]), rules)):
            return kernel in jax.jit(lambda *arrays: program(*arrays)).lower(*arrays).as_text()

    assert is_used(1)
    assert not is_used(2), "the compiler cannot divide a kernel among devices"
    assert not is_used(1, TRAIN)
    monkeypatch.setattr(native_library, "is_available", lambda: False)
    assert not is_used(1)
