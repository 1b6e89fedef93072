"""The table of what each row has met: the same on one device and cut over many, and nothing of it gathered."""

import jax
import numpy as np
import pytest

from qwen_dist.engine import token_presence
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.planning.compile import count_collectives
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding

ROWS, VOCAB, LENGTH = 8, 48, 5


def blocks(rng):
    """A block for each row of each part of the batch, in the order of a piece: some begin, some go on, some are none."""
    rows = np.arange(ROWS, dtype=np.int32)
    rows[rng.random(ROWS) < 0.3] = ROWS
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32)
    positions = np.arange(LENGTH, dtype=np.int32) + 7 * rng.integers(0, 2, (ROWS, 1), dtype=np.int32)
    positions[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, (ROWS, 1))] = -1
    return rows, tokens, positions


def expected(table, rows, tokens, positions):
    table = table.copy()
    for row, of_row, at in zip(rows, tokens, positions, strict=True):
        if row < ROWS:
            table[row] &= at[0] != 0
            table[row, of_row[at >= 0]] = True
    return table


@pytest.mark.parametrize("mesh", ["data=1", "data=4,tensor=2", "data=2,expert=2,context=2", "fsdp=2,tensor=4"])
def test_what_rows_have_met(mesh):
    config = MeshConfig.parse(mesh)
    sharding_ctx = ShardingContext(make_mesh(config, jax.devices()[: 1 if mesh == "data=1" else 8]), INFERENCE)

    def jitted(function):
        def run(*operands):
            with use_sharding(sharding_ctx):
                return function(*operands)

        return jax.jit(run)

    read, add, of_rows = map(jitted, (token_presence.add_chunks, token_presence.add_tokens, token_presence.of_slots))
    with use_sharding(sharding_ctx):
        table = jax.jit(lambda: token_presence.empty(ROWS, VOCAB))()
    wanted = np.zeros((ROWS, VOCAB), bool)
    rng = np.random.default_rng(0)
    for _ in range(6):
        rows, tokens, positions = blocks(rng)
        table, wanted = read(table, rows, tokens, positions), expected(wanted, rows, tokens, positions)
        np.testing.assert_array_equal(table, wanted)
        one_each = tokens[:, 0]
        table = add(table, rows, one_each)
        wanted[rows[rows < ROWS], one_each[rows < ROWS]] = True
        np.testing.assert_array_equal(table, wanted)
        np.testing.assert_array_equal(np.asarray(of_rows(table, rows))[rows < ROWS], wanted[rows[rows < ROWS]])
    assert 0.05 < wanted.mean() < 0.95
    for program in (
        read.lower(table, rows, tokens, positions),
        add.lower(table, rows, one_each),
        of_rows.lower(table, rows),
    ):
        assert not count_collectives(program.compile().as_text())
