"""The C++ kernel of the gated delta rule against its recurrence and against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_steps import random_inputs, steps
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernels import needs_kernels

from qwen_dist.ops import native
from qwen_dist.ops.delta_rule import DeltaInputs, delta_rule_in_slots_plain
from qwen_dist.ops.slots import SlotRows

pytestmark = [needs_kernels, pytest.mark.usefixtures("cpu_build")]

# Of the largest number: what float32 loses in a few hundred tokens.
TOLERANCE = 5e-6
DTYPES = ("float32", "bfloat16")


def on_device(inputs: DeltaInputs, dtype: str) -> DeltaInputs:
    """The gates stay in float32, as the model makes them."""
    return DeltaInputs(*(jnp.asarray(x, "float32" if name == "g_BTGR" else dtype) for name, x in inputs._asdict().items()))


def rows_of(counts: list[list[int]], T: int, slots: list[int], is_start: list[bool]) -> tuple[SlotRows, np.ndarray]:
    """Return the rows of sequences, each a list of the rows' numbers of tokens, and which tokens are real [B, T]."""
    continues_B = np.array([row > 0 for of_sequence in counts for row in range(len(of_sequence))])
    slots_B, is_start_B = (np.repeat(x, [len(of_sequence) for of_sequence in counts]) for x in (slots, is_start))
    is_real_BT = np.arange(T) < np.array([count for of_sequence in counts for count in of_sequence])[:, None]
    return SlotRows(slots_B.astype(np.int32), is_start_B & ~continues_B, continues_B), is_real_BT


def without_padding(inputs: DeltaInputs, is_real_BT: np.ndarray) -> DeltaInputs:
    return DeltaInputs(*(np.where(is_real_BT.reshape(*is_real_BT.shape, *(1,) * (x.ndim - 2)), x, 0) for x in inputs))


def close(got, expected, what: str):
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * scale, rtol=0, err_msg=what)


def expect_steps(inputs: DeltaInputs, pool: np.ndarray, rows: SlotRows, is_real_BT: np.ndarray):
    """Return what the rule makes of each sequence alone: outputs of real tokens, else 0, and the pool."""
    outputs, pool = np.zeros(inputs.v_BTGRV.shape), pool.astype(np.float64)
    begins = np.flatnonzero(~rows.continues_B)
    for first, end in zip(begins, [*begins[1:], len(is_real_BT)], strict=True):
        slot = rows.slots_B[first]
        if slot >= pool.shape[1]:
            continue
        state = np.zeros_like(pool[:, slot]) if rows.is_start_B[first] else pool[:, slot]
        for row in range(first, end):
            index = np.flatnonzero(is_real_BT[row])
            if len(index):
                tokens = jax.tree.map(lambda x: np.asarray(x)[row, index][None], inputs)  # noqa: B023
                outputs[row, index], state = (x[0] for x in steps(tokens, state))
                state = state[None]
            to = slot if row == end - 1 else rows.saved_slots_B[row]
            if to < pool.shape[1]:
                pool[:, to] = state
    return outputs, pool


@st.composite
def cases(draw):
    T = draw(st.sampled_from([1, 2, 5, 32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = []
    for _ in range(draw(st.integers(1, 4))):
        full = [T] * draw(st.integers(0, 3))
        counts.append([*full, draw(st.integers(0, T))])
    num_slots = len(counts) + 4
    order = rng.permutation(num_slots).tolist()
    # One sequence in four is padding: it has the number of all slots.
    slots = [num_slots if rng.random() < 0.25 else slot for slot in order[: len(counts)]]
    rows, is_real_BT = rows_of(counts, T, slots, [rng.random() < 0.5 for _ in counts])
    # The state between two rows goes to a slot that no sequence has, after some of the rows.
    saved_slots_B = np.full(len(is_real_BT), num_slots, np.int32)
    saving = rng.permutation(len(is_real_BT))[:3]
    saved_slots_B[saving] = order[len(counts) : len(counts) + len(saving)]
    rows = rows._replace(saved_slots_B=saved_slots_B)
    is_real_BT &= (rows.slots_B < num_slots)[:, None]
    sizes = [draw(st.sampled_from(x)) for x in ([1, 2, 3], [1, 2, 3], [1, 5, 16, 33, 128], [1, 8, 16, 33, 80, 128])]
    inputs = random_inputs(rng, *is_real_BT.shape, *sizes, gates=draw(st.sampled_from([(0.01, 1, 40), (0,), (1000,)])))
    if draw(st.booleans()):
        inputs = inputs._replace(k_BTGK=np.broadcast_to(inputs.k_BTGK[:1, :1], inputs.k_BTGK.shape))
    pool = rng.standard_normal((1, num_slots, *sizes)).astype(np.float32)
    return on_device(without_padding(inputs, is_real_BT), draw(st.sampled_from(DTYPES))), pool, rows, is_real_BT


@settings(max_examples=80, deadline=None)
@given(cases())
def test_it_is_the_recurrence_of_each_sequence(case):
    inputs, pool, rows, is_real_BT = case
    assert native.can_delta_rule_in_slots(inputs, jnp.asarray(pool), rows)
    o, new = native.delta_rule_in_slots(inputs, jnp.asarray(pool), rows)
    assert o.dtype == new.dtype == jnp.float32
    expected_o, expected = expect_steps(inputs, pool, rows, is_real_BT)
    close(o, expected_o, "outputs")
    close(new, expected, "states")
    others = np.setdiff1d(np.arange(pool.shape[1]), [*rows.slots_B, *rows.saved_slots_B])
    np.testing.assert_array_equal(np.asarray(new)[:, others], pool[:, others])
    # A sequence of which no token is real keeps its state.
    begins = np.flatnonzero(~rows.continues_B)
    num_real = np.add.reduceat(is_real_BT.sum(1), begins)
    idle = rows.slots_B[begins[(num_real == 0) & ~rows.is_start_B[begins]]]
    idle = idle[idle < pool.shape[1]]
    np.testing.assert_array_equal(np.asarray(new)[:, idle], pool[:, idle])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "continues"), [(1, None), (32, None), (7, [False, True, False, False])])
def test_it_equals_the_plain_form(T, continues, dtype):
    rng = np.random.default_rng(T)
    # The plain form's decays within a chunk are differences of sums of gates, less exact where gates are strong.
    inputs = on_device(random_inputs(rng, 4, T, 2, 3, 20, 36, gates=(0.01, 1)), dtype)
    pool = jnp.asarray(rng.standard_normal((1, 5, 2, 3, 20, 36)), jnp.float32)
    slots_B = jnp.array([4, 0, 5, 2]) if continues is None else jnp.array([1, 1, 3, 0])
    rows = SlotRows(slots_B, jnp.array([False, True, False, False]), None if continues is None else jnp.array(continues))
    if continues is not None:
        rows = rows._replace(saved_slots_B=jnp.array([4, 5, 5, 2]))  # only the first row is followed
    o, new = native.delta_rule_in_slots(inputs, pool, rows)
    plain_o, plain = jax.jit(delta_rule_in_slots_plain)(inputs, pool, rows)
    has_slot_B = np.asarray(slots_B) < 5
    close(np.asarray(o)[has_slot_B], np.asarray(plain_o)[has_slot_B], "outputs")
    close(new, plain, "states")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_any_split_into_rows_and_steps_gives_the_same_bits(seed, dtype):
    rng = np.random.default_rng(seed)
    num_tokens, sizes = 96, (2, 2, 24, 40)
    inputs = on_device(random_inputs(rng, 1, num_tokens, *sizes), dtype)
    pool = jnp.asarray(rng.standard_normal((1, 3, *sizes)), jnp.float32)
    rows, _ = rows_of([[num_tokens]], num_tokens, [1], [True])
    whole, end = native.delta_rule_in_slots(inputs, pool, rows)
    position, outputs, states = 0, [], pool
    while position < num_tokens:
        T = int(rng.choice([1, 2, 8, 32]))
        count = min(int(rng.integers(1, 3 * T + 1)), num_tokens - position)
        counts = [T] * (count // T) + [count % T] * (count % T > 0)
        rows, is_real_BT = rows_of([counts], T, [1], [position == 0])
        part = jax.tree.map(lambda x: np.zeros((*is_real_BT.shape, *x.shape[2:]), x.dtype), inputs)  # noqa: B023
        for to, x in zip(part, inputs, strict=True):
            to[is_real_BT] = x[0, position : position + count]
        o, states = native.delta_rule_in_slots(jax.tree.map(jnp.asarray, part), states, rows)
        outputs.append(np.asarray(o)[is_real_BT])
        position += count
    np.testing.assert_array_equal(np.concatenate(outputs), whole[0])
    np.testing.assert_array_equal(states, end)


def test_a_sequence_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    inputs, pool = on_device(random_inputs(rng, 5, 8, 2, 1, 16, 20), "float32"), rng.standard_normal((1, 5, 2, 1, 16, 20))
    pool = jnp.asarray(pool, jnp.float32)
    slots_B = np.array([3, 0, 4, 1, 2], np.int32)
    nobody_B = np.zeros(5, bool)
    together, states = native.delta_rule_in_slots(inputs, pool, SlotRows(slots_B, nobody_B))
    for row in range(5):
        one = jax.tree.map(lambda x: x[row : row + 1], inputs)  # noqa: B023
        o, alone = native.delta_rule_in_slots(one, pool, SlotRows(slots_B[row : row + 1], nobody_B[:1]))
        np.testing.assert_array_equal(o[0], together[row])
        np.testing.assert_array_equal(alone[:, slots_B[row]], states[:, slots_B[row]])
