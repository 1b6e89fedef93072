"""The comparison catches every mutation and names the component that was broken."""

from __future__ import annotations

import functools

import pytest
from mutations import MUTATIONS, SCENARIOS, Bench
from native_kernels import needs_kernels

every_mutation = pytest.mark.parametrize(
    "mutation",
    [pytest.param(one, marks=needs_kernels if one.scenario == "kernels" else ()) for one in MUTATIONS],
    ids=lambda mutation: mutation.what.replace(" ", "_"),
)


@pytest.fixture(scope="module")
def bench(tiny_checkpoint):
    return functools.lru_cache(lambda scenario: Bench(scenario, tiny_checkpoint))


@pytest.fixture(scope="module")
def table():
    """Lines collected by the tests, printed (under -s) when all are through."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join([f"{'mutation':46} {'named':32} off by", *lines]))


@every_mutation
def test_mutation_applies(mutation):
    """In the default run too, so that a mutation follows the function that it edits."""
    with mutation.applied():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_mutation_nothing_is_beyond(bench, scenario):
    assert bench(scenario).first_failure() is None


@pytest.mark.slow
@every_mutation
def test_mutation_is_caught_and_named(bench, table, mutation):
    with mutation.applied():
        failure = bench(mutation.scenario).first_failure()
    table.append(
        f"{mutation.what:46} {failure.name if failure else 'NOT CAUGHT':32} {failure.measured if failure else 0:.2g}"
    )
    assert failure is not None, f"{mutation.what} was not caught"
    assert failure.name == mutation.named, str(failure)
