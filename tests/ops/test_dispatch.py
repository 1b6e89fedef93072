"""Which implementation of each operation runs where, and that every one computes what the plain form does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_kernels import needs_kernels

from qwen_dist.errors import UsageError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops import native, native_library
from qwen_dist.ops.delta_rule import DeltaInputs
from qwen_dist.ops.dispatch import Backend, active_backend
from qwen_dist.ops.grouped_weight import GroupedFormat
from qwen_dist.ops.matmul import MATMUL
from qwen_dist.ops.native_library import BUILDS, PLAIN, VARIABLE
from qwen_dist.ops.paged_cache import MAX_ENTRIES, PAGE, PagedState, PageIndices
from qwen_dist.ops.slots import SlotRows
from qwen_dist.ops.table import OPS, dispatch_table
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext, use_sharding


def test_the_table_has_a_plain_form_of_every_operation_for_every_backend(monkeypatch):
    """Run with -s to read it: a CPU with each build of the kernels and with none, a TPU and a GPU."""
    machines = [("tpu", PLAIN), ("gpu", PLAIN), *(("cpu", build) for build in (*BUILDS, PLAIN))]
    table = dispatch_table()
    assert table.keys() == {op.name for op in OPS} and len(table) == len(OPS)
    for platform, build in machines:
        monkeypatch.setattr(native_library, "active_build", lambda build=build: build)
        for phase in ("inference", "train"):
            backend = Backend.of_platform(platform, 1, phase)
            print(f"\n{platform}{f' {build}' if platform == 'cpu' else ''}, {phase}: {backend.value}")
            for name, row in table.items():
                print(f"  {name:32} {' → '.join(row[backend])}")
                assert row[backend][-1] == "plain", f"{name} has no plain form on {backend.value}"
            assert (backend is Backend.CPU_KERNELS) == (platform == "cpu" and phase == "inference" and build != PLAIN)
    assert Backend.of_platform("cuda", 1, "inference") is Backend.GPU


def test_the_backend_is_that_of_the_mesh_and_the_phase(monkeypatch):
    monkeypatch.setattr(native_library, "is_available", lambda: True)
    found = {}
    for devices in (1, 2):
        mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
        for rules in (INFERENCE, TRAIN):
            with use_sharding(ShardingContext(mesh, rules)):
                found[devices, rules.phase] = active_backend()
                assert Backend.of(mesh, rules.phase) is found[devices, rules.phase]
    assert found == {
        (1, "inference"): Backend.CPU_KERNELS,
        (2, "inference"): Backend.CPU_KERNELS_LOCAL,
        (1, "train"): Backend.CPU,
        (2, "train"): Backend.CPU,
    }
    assert active_backend() is Backend.CPU, "outside of a mesh there may be gradients"


def test_a_build_can_be_forced(monkeypatch):
    """It is one that this machine has, or none; without the variable, the best."""
    available = native_library.available_builds()
    monkeypatch.delenv(VARIABLE, raising=False)
    assert native_library.active_build() == (*available, PLAIN)[0]
    for name in BUILDS:
        monkeypatch.setenv(VARIABLE, name)
        if name in available:
            assert native_library.active_build() == name and native_library.is_available()
            continue
        reason = "this processor lacks its instructions" if native_library.load() else "the kernels were not compiled"
        with pytest.raises(UsageError, match=f"^{VARIABLE}={name}: {reason}; this machine has .*{PLAIN}$"):
            native_library.active_build()
    monkeypatch.setenv(VARIABLE, PLAIN)
    assert not native_library.is_available()
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(UsageError, match=f"^{VARIABLE}=: there is no such build"):
        native_library.active_build()


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def attention_arguments(dtype, head_dim, num_shards=1):
    pool = (num_shards, 1, 1, PAGE, head_dim)
    state = PagedState(*(random(pool, dtype, seed).view(jnp.uint16 if dtype == "bfloat16" else dtype) for seed in (1, 2)))
    row = np.zeros((num_shards, MAX_ENTRIES), np.int32)
    start = np.where(np.arange(MAX_ENTRIES) < 1, row, 2**30)
    pages = PageIndices(np.zeros((1, 1)), np.zeros(1), row, row, start, np.int32(1))
    return random((num_shards, 1, 2, head_dim), dtype), state, jnp.full((num_shards, 1), 5, jnp.int32), pages, None


FLOATS = ("float32", "bfloat16", "float16")


def matmul_arguments(x, weight, result, num_out):
    return random((2, 8), x), random((num_out, 8), weight), result


def grouped_matmul_arguments(x, weight, result, num_out):
    return random((2, 8), x), random((2, num_out, 8), weight), jnp.array([1, 1]), result


def quantized_weight(dtype, scale, encoding, run, *shape):
    form = GroupedFormat(encoding, 64, 32 if run == 32 else run, scale, dtype)
    tensors = form.tensors((*shape, 64), dtype, ("a",) * len(shape) + ("b",))
    return form.assemble({suffix: random(spec.shape, spec.dtype) for suffix, spec in tensors.items()})


def quantized_matmul_arguments(x, scale, encoding, run, result, num_out):
    return random((2, 64), x), quantized_weight(x, scale, encoding, run, num_out), result


def quantized_grouped_matmul_arguments(x, encoding, num_out):
    weight = quantized_weight(x, "bfloat16", encoding, 32, 2, num_out)
    return random((2, 64), x), weight, jnp.array([1, 1]), "float32"


def swiglu_arguments(gate, up):
    return random((3, 5), gate), random((3, 5), up)


def rotate_arguments(x, angles):
    return random((1, 2, 3, 8), x), random((1, 2, 4), angles), random((1, 2, 4), angles)


def delta_rule_arguments(dtype, value_dtype, pool_dtype, num_shards):
    keys, gates = random((2, 3, 2, 8), dtype), random((2, 3, 2, 1), "float32")
    inputs = DeltaInputs(keys, keys, random((2, 3, 2, 1, 4), value_dtype), -jnp.abs(gates), jnp.abs(gates))
    rows = SlotRows(jnp.array([1, 0]), jnp.array([False, True]))
    return inputs, random((num_shards, 2, 2, 1, 8, 4), pool_dtype), rows


def convolution_arguments(dtype, weight_dtype, num_taps):
    return random((2, 3, 2, 5), dtype), random((2, num_taps - 1, 2, 5), dtype), random((2, 5, num_taps), weight_dtype), None


# Of each kernel the predicate, the function, and arguments at the edge of what it takes.
QUANTIZED = FLOATS, ("bfloat16", "float16"), ("int4",), (16, 32), FLOATS, (3, 4)
QUANTIZED_GROUPS = FLOATS, ("int8", "int4", "float8_e4m3fn"), (3, 4)
CASES = [
    (native.can_matmul, native.matmul, matmul_arguments, FLOATS, FLOATS, FLOATS, (3, 4)),
    (native.can_grouped_matmul, native.grouped_matmul, grouped_matmul_arguments, FLOATS, FLOATS, FLOATS, (3, 4)),
    (native.can_quantized_matmul, native.quantized_matmul, quantized_matmul_arguments, *QUANTIZED),
    (
        native.can_quantized_grouped_matmul,
        native.quantized_grouped_matmul,
        quantized_grouped_matmul_arguments,
        *QUANTIZED_GROUPS,
    ),
    (native.can_swiglu, native.swiglu, swiglu_arguments, FLOATS, FLOATS),
    (native.can_rotate, native.rotate, rotate_arguments, FLOATS, FLOATS),
    (native.can_paged_attention, native.paged_attention, attention_arguments, FLOATS[:2], (8, 16, 24, 32), (1, 2)),
    (native.can_short_convolution, native.short_convolution, convolution_arguments, FLOATS, FLOATS, (1, 4, 8, 9)),
    (native.can_delta_rule_in_slots, native.delta_rule_in_slots, delta_rule_arguments, FLOATS, FLOATS, FLOATS[:2], (1, 2)),
]


@needs_kernels
@pytest.mark.usefixtures("cpu_build")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].__name__)
def test_predicates_say_what_the_kernels_take(case):
    """Where a predicate says no, the kernel refuses the arguments itself."""
    can, run, make, *values = case
    decisions = []
    for combination in itertools.product(*values):
        arguments = make(*combination)
        try:
            jax.block_until_ready(run(*arguments))
            runs = True
        except jax.errors.JaxRuntimeError as error:
            assert "INVALID_ARGUMENT" in str(error), error
            runs = False
        assert can(*arguments) == runs, combination
        decisions.append(runs)
    assert any(decisions) and not all(decisions)


def test_one_narrow_row_is_padded_and_equals_the_plain_form():
    x, weight = random((1, 16), "bfloat16"), random((8, 16), "bfloat16", 1)
    float32 = jnp.dtype("float32")
    chosen = MATMUL.select(Backend.CPU, x, weight, float32)
    assert chosen.name == "two rows"
    np.testing.assert_allclose(chosen.run(x, weight, float32), MATMUL.plain.run(x, weight, float32), rtol=1e-5, atol=1e-6)
    assert MATMUL.select(Backend.TPU, x, weight, float32) is MATMUL.plain
