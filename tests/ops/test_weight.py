"""A weight in 8 or 4 bits: its values, its products, and how a layer declares, shards and uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_kernels import needs_kernels

from qwen_dist.errors import UsageError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models import layers
from qwen_dist.models.parameters import abstract_parameters, with_parameters
from qwen_dist.ops import native
from qwen_dist.ops.experts import ExpertWeights, experts
from qwen_dist.ops.grouped_matmul import grouped_matmul
from qwen_dist.ops.grouped_weight import GroupedFormat, GroupedWeight, grouped_format, unpack_runs
from qwen_dist.ops.matmul import matmul
from qwen_dist.ops.weight import QuantizedWeight, to_array
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding

OUT, IN = 24, 64
FORMS = [
    GroupedFormat("int4", IN, 32, "bfloat16", "float32"),
    GroupedFormat("int4", IN, 8, "float16", "bfloat16", has_zero_point=True),
    GroupedFormat("int4", IN, 16, "float16", "float32", has_zero_point=True, has_group_index=True),
    GroupedFormat("int8", IN, IN, "float32", "float32"),
    GroupedFormat("int8", IN, 16, "bfloat16", "float64", has_zero_point=True),
    GroupedFormat("float8_e4m3fn", IN, 32, "float32", "bfloat16"),
]


def make(form, *out, seed=0):
    """Return the arrays of a weight [*out, IN] by suffix, and its values element by element, in float32."""
    rng, half = np.random.default_rng(seed), 8 if form.encoding == "int4" else 128
    groups, runs = form.num_groups, form.in_features // form.run
    scale = rng.uniform(1e-6, 0.02, (*out, groups)).astype(form.scale_dtype)
    zero = rng.integers(-half, half, (*out, groups)) if form.has_zero_point else np.zeros((*out, groups), int)
    index = np.arange(form.in_features) // form.group_size
    index = rng.permutation(index) if form.has_group_index else index
    if form.encoding.startswith("float8"):
        values = rng.standard_normal((*out, form.in_features)).astype(form.encoding)
        stored = values
    else:
        values = rng.integers(-half, half, (*out, form.in_features))
        stored = values.astype(np.int8)
    stored = stored.reshape(*out, runs, form.run)
    if form.encoding == "int4":
        low, high = np.split((stored + 8).astype(np.uint8), 2, axis=-1)
        stored = low + 16 * high
    expected = np.empty(values.shape, np.float32)
    for place in np.ndindex(values.shape):
        group = (*place[:-1], index[place[-1]])
        exact = (np.float32(values[place]) - np.float32(zero[group])) * np.float32(scale[group])
        expected[place] = np.float32(scale.dtype.type(exact))
    arrays = {"": stored, "_scale": scale[..., None]}
    if form.has_zero_point:
        arrays["_zero_point"] = zero.astype(np.int8)[..., None]
    if form.has_group_index:
        arrays["_group_index"] = index.astype(np.int32).reshape(runs, form.run)
    return jax.tree.map(jnp.asarray, arrays), expected.astype(form.dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_are_bit_for_bit_those_written_out(form):
    with jax.enable_x64(form.dtype == "float64"):
        arrays, expected = make(form, 3, OUT)
        weight = form.assemble(arrays)
        assert isinstance(weight, QuantizedWeight) and weight.shape == (3, OUT, IN) and weight.ndim == 3
        found = jax.jit(to_array)(weight)
        assert found.dtype == form.dtype
        np.testing.assert_array_equal(np.asarray(found), expected)
        np.testing.assert_array_equal(np.asarray(to_array(weight.reshape(-1, IN))), expected.reshape(-1, IN))
        declared = {suffix: spec.shape for suffix, spec in form.tensors((3, OUT, IN), form.dtype, ("a", "b", "c")).items()}
        assert declared == {suffix: array.shape for suffix, array in arrays.items()}


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_products_are_those_of_the_dequantised_weight(form):
    arrays, _ = make(form, OUT)
    weight, x = form.assemble(arrays), jax.random.normal(jax.random.key(2), (5, IN), form.dtype)
    np.testing.assert_array_equal(matmul(x, weight), matmul(x, to_array(weight)))
    if not form.has_group_index:
        stacked, sizes = form.assemble(make(form, 3, OUT)[0]), jnp.array([2, 0, 3])
        found, expected = (grouped_matmul(x, w, sizes, "float32") for w in (stacked, to_array(stacked)))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_only_weights_of_groups_with_rows_become_arrays():
    """The program has an array of one group's weight, not of all."""
    form = GroupedFormat("int4", IN, 32, "float32", "float32")
    stacked, x = form.assemble(make(form, 48, OUT)[0]), jnp.ones((5, IN))
    run = jax.jit(functools.partial(grouped_matmul, dtype=jnp.dtype("float32")))
    memory = run.lower(x, stacked, jnp.zeros(48, jnp.int32).at[7].set(5)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 48 * OUT * IN * 4 / 3


def context(mesh):
    config = MeshConfig.parse(mesh)
    return ShardingContext(make_mesh(config, jax.devices()[: config.num_devices]), INFERENCE)


def quantized_linear(form, out, inp):
    linear = layers.Linear(out, inp, bias=False, dtype=form.dtype, std=0.02)
    linear.weight.set_metadata(weight_format=grouped_format(form))
    return linear


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[3]], ids=str)
@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,tensor=2"])
def test_a_layer_declares_and_uses_it(form, mesh):
    sharding_ctx, linear = context(mesh), quantized_linear(form, {"embed": OUT}, {"q_heads": 4, "head_dim": 16})
    target = abstract_parameters(linear, sharding_ctx)
    arrays, expected = make(form, OUT)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in target.items()} == {
        "weight" + suffix: (array.shape, array.dtype) for suffix, array in arrays.items()
    }
    parameters = {
        "weight" + suffix: jax.device_put(array, target["weight" + suffix].sharding) for suffix, array in arrays.items()
    }

    @jax.jit
    def run(parameters, x):
        with use_sharding(sharding_ctx):
            return with_parameters(linear, parameters)(x)

    x = jax.random.normal(jax.random.key(3), (4, 4, 16))
    np.testing.assert_allclose(run(parameters, x), np.asarray(x).reshape(4, IN) @ expected.T, rtol=1e-5, atol=1e-5)


def test_a_shard_boundary_cuts_no_group():
    linear = quantized_linear(FORMS[0], {"embed": OUT}, {"mlp": IN})
    with pytest.raises(
        UsageError, match="mlp has 2 groups of quantised weights, which the 4 shards of tensor do not divide"
    ):
        abstract_parameters(linear, context("tensor=4"))


@pytest.mark.parametrize("mesh", ["data=1", "expert=2,tensor=2"])
def test_experts_are_sharded_by_their_arrays(mesh):
    """Of gate and up the in-features are `embed`, of down they are `mlp`, in groups."""
    sharding_ctx, num_experts = context(mesh), 4
    of_up, of_down = (GroupedFormat("int4", IN, 32, "float32", "float32") for _ in range(2))
    (up, up_values), (down, down_values) = make(of_up, num_experts, 2, IN), make(of_down, num_experts, IN, seed=1)
    axes = ExpertWeights(("experts", "gate_up", "mlp", "embed")), ExpertWeights(("experts", "embed", "mlp"))
    x = jax.random.normal(jax.random.key(1), (4, 2, IN))
    chosen = jax.random.randint(jax.random.key(2), (4, 2, 2), 0, num_experts)
    scores = jnp.full((4, 2, 2), 0.5)

    def run(gate_up, down):
        with use_sharding(sharding_ctx):
            return experts(x, chosen, scores, ExpertWeights(gate_up), ExpertWeights(down), axes)[0]

    found = jax.jit(run)(of_up.assemble(up), of_down.assemble({suffix: array for suffix, array in down.items()}))
    expected = jax.jit(run)(jnp.asarray(up_values), jnp.asarray(down_values))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_equal_formats_are_one_object():
    """So that layers that are alike are compiled once."""
    one, other = (grouped_format(GroupedFormat("int4", IN, 32, "bfloat16", "float32")) for _ in range(2))
    assert one is other and isinstance(one.assemble(make(FORMS[0], OUT)[0]), GroupedWeight)


KERNEL_FORMS = [
    GroupedFormat(encoding, 128, group, scale, dtype, has_zero_point=has_zero_point)
    for encoding, group, scale, dtype, has_zero_point in (
        ("int4", 32, "bfloat16", "bfloat16", False),
        ("int4", 64, "float16", "bfloat16", True),
        ("int4", 128, "float32", "float32", True),
        ("int8", 32, "bfloat16", "bfloat16", False),
        ("int8", 128, "float16", "float32", True),
    )
]


# The most bfloat16 rows, on average over the groups, whose sums are scaled: by build, else 8.
FEW_ROWS = {"amx_bf16": 3}


@needs_kernels
@pytest.mark.parametrize(
    ("form", "num_rows"),
    [(form, rows) for form in KERNEL_FORMS for rows in ((1, 4, 5, 60) if form.dtype == "float32" else (25, 60))],
    ids=str,
)
def test_the_kernel_gives_the_bits_of_the_dequantised_weight(form, num_rows, cpu_build):
    """In float32 for any number of rows, in bfloat16 for more than a few; alone and in groups."""
    arrays, _ = make(form, 3, 70)
    weight, x = form.assemble(arrays), jax.random.normal(jax.random.key(0), (num_rows, 128), form.dtype)
    sizes = jnp.array([num_rows // 2, 0, num_rows - num_rows // 2])
    assert native.can_quantized_grouped_matmul(x, weight, sizes, "float32")
    found = native.quantized_grouped_matmul(x, weight, sizes, "float32")
    expected = native.grouped_matmul(x, jax.jit(to_array)(weight), sizes, "float32")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    one = weight.take(jnp.int32(1))
    found, expected = native.quantized_matmul(x, one, form.dtype), native.matmul(x, jax.jit(to_array)(one), form.dtype)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@needs_kernels
@pytest.mark.parametrize("has_zero_point", [False, True])
@pytest.mark.parametrize("scale", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("num_in", "group"), [(32, 32), (96, 96), (160, 32), (192, 64), (288, 288), (896, 128)])
@pytest.mark.parametrize("encoding", ["int4", "int8"])
def test_sums_of_few_rows_are_scaled(encoding, num_in, group, scale, has_zero_point, cpu_build):
    """No element of the weight is rounded. Also where a group or a row is not a whole number of vectors."""
    form = GroupedFormat(encoding, num_in, group, scale, "bfloat16", has_zero_point=has_zero_point)
    few = FEW_ROWS.get(cpu_build, 8)
    arrays, _ = make(form, 3, 7)
    weight, x = form.assemble(arrays), jax.random.normal(jax.random.key(0), (3 * few, num_in), "bfloat16")
    values, scale = (
        unpack_runs(weight.values) if encoding == "int4" else weight.values,
        np.asarray(weight.scale, np.float64),
    )
    values = np.asarray(values, np.float64).reshape(*scale.shape[:-1], -1)
    zero_point = np.zeros_like(scale) if weight.zero_point is None else np.asarray(weight.zero_point, np.float64)
    exact = ((values - zero_point) * scale).reshape(3, 7, num_in)
    # Values and zero points are multiplied apart, so their rounding errors do not cancel.
    largest = ((np.abs(values) + np.abs(zero_point)) * scale).reshape(3, 7, num_in)
    rows, first = np.asarray(x, np.float64), 5 * few // 2
    sizes = jnp.array([first, 0, len(x) - first])
    found = np.asarray(native.quantized_grouped_matmul(x, weight, sizes, "float32"))
    for index, of_group in ((0, slice(0, first)), (2, slice(first, None))):
        error, bound = np.abs(found[of_group] - rows[of_group] @ exact[index].T), np.abs(rows[of_group]) @ largest[index].T
        assert (error <= 1e-6 * bound).all(), (error / bound).max()

    one = weight.take(jnp.int32(2))
    together = np.asarray(native.quantized_matmul(x[:few], one, "bfloat16"))
    alone = [np.asarray(native.quantized_matmul(x[row : row + 1], one, "bfloat16"))[0] for row in range(few)]
    np.testing.assert_array_equal(together, alone)


@needs_kernels
@pytest.mark.parametrize(("encoding", "group"), [("int4", 32), ("int8", 32), ("int8", 128)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e32])
def test_inputs_of_very_different_sizes(encoding, group, size, cpu_build):
    """Builds that add integers have 15 bits and a sign for inputs, so small ones in a run with a large one lose digits."""
    form = GroupedFormat(encoding, 256, group, "float32", "bfloat16")
    weight = form.assemble(make(form, 7)[0])
    values = np.asarray(unpack_runs(weight.values) if encoding == "int4" else weight.values, np.float64)
    exact = (values.reshape(7, -1, group) * np.asarray(weight.scale, np.float64)).reshape(7, 256)
    x = np.array(jax.random.normal(jax.random.key(0), (3, 256), "float32")) * size
    x[0, 40] *= 1000
    x[1, ::3] = 0
    x[2] *= 2.0 ** np.linspace(-12, 0, 256)
    x = jnp.asarray(x, "bfloat16")
    found = np.asarray(native.quantized_matmul(x, weight, "float32"))
    rows = np.asarray(x, np.float64)
    # Runs of four that follow each other: with int8 the first and the third have one scale.
    largest = np.abs(rows).reshape(3, -1, 128).max(-1).repeat(128, -1)
    bound = (1e-6 * np.abs(rows) + 2.0**-15 * largest) @ np.abs(exact).T
    assert (np.abs(found - rows @ exact.T) <= bound).all()


@needs_kernels
@pytest.mark.parametrize("encoding", ["int4", "int8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_inputs_that_are_not_finite_give_no_finite_results(encoding, value, cpu_build):
    form = GroupedFormat(encoding, 128, 32, "bfloat16", "bfloat16")
    x = jnp.ones((3, 128), "bfloat16").at[1, 77].set(value)
    found = np.asarray(native.quantized_matmul(x, form.assemble(make(form, 7)[0]), "float32"))
    assert np.isfinite(found[[0, 2]]).all() and not np.isfinite(found[1]).any()
