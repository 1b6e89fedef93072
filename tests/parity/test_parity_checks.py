"""The measures of known differences, and that no wrong value passes a check."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from qwen_dist.errors import UsageError
from qwen_dist.parity.checks import NextTokenAgreement, check, difference, first_exceeding, missing_check
from qwen_dist.parity.inputs import Inputs, ParityOptions, random_tokens
from qwen_dist.parity.tolerances import Tolerance

TENTH = Tolerance("max_abs", 0.1)


def test_each_measure():
    found = difference(np.array([1.0, 2.0, 3.5]), np.array([1.0, 2.0, 4.0]))
    assert found.max_abs == 0.5
    assert found.max_rel == 0.125
    assert found.relative == pytest.approx(0.5 / math.sqrt(21))
    assert found.max_ulp == 0.5 / 2**-50  # 4.0 is in [2^2, 2^3), whose last place is 2^(2 - 52)
    assert found.differing == pytest.approx(1 / 3)
    assert found.cosine == pytest.approx((1 + 4 + 14) / math.sqrt((1 + 4 + 12.25) * 21))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [1.0, 1.5, 3.0, 1e-20, -7.0])
def test_neighbours_are_one_ulp_apart(dtype, value):
    reference = np.array([value], dtype)
    bits = reference.view(f"i{reference.itemsize}")
    assert difference((bits + 1).view(dtype), reference).max_ulp == 1
    assert difference((bits + 3).view(dtype), reference).max_ulp == 3


def test_equal_arrays_differ_by_nothing():
    found = difference(np.zeros((3, 2)), np.zeros((3, 2)))
    assert (found.max_abs, found.max_rel, found.relative, found.max_ulp, found.differing) == (0, 0, 0, 0, 0)
    assert found.cosine == 1


@pytest.mark.parametrize("metric", ["max_abs", "relative"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_fail_every_check(bad, metric):
    ours = np.array([1.0, bad, 3.0])
    result = check("whole model", "x", ours, np.ones(3), Tolerance(metric, 1e300))
    assert not result.is_within
    assert "element [1]" in result.where


def test_a_nan_of_the_reference_fails():
    assert not check("whole model", "x", np.ones(2), np.array([1.0, math.nan]), TENTH).is_within


def test_the_first_place_beyond_the_bound_is_named():
    ours = np.zeros((4, 3))
    ours[2, 1], ours[3, 0] = 0.2, 0.9
    assert first_exceeding(ours, np.zeros((4, 3)), 0.1) == (2, 1)
    result = check("whole model", "x", ours, np.zeros((4, 3)), TENTH, [f"token {i}" for i in range(4)])
    assert result.where.startswith("token 2, element [1]: 0.2 instead of 0.0")
    assert first_exceeding(ours, np.zeros((4, 3)), 1.0) is None


def test_the_first_place_is_found_after_the_first_block(monkeypatch):
    monkeypatch.setattr("qwen_dist.parity.checks._BLOCK_SIZE", 5)
    ours = np.arange(12.0)
    ours[7] += 1
    assert first_exceeding(ours, np.arange(12.0), 0.5) == (7,)
    assert difference(ours, np.arange(12.0)).max_abs == 1


def test_other_shapes_and_missing_arrays_fail():
    assert not check("whole model", "x", np.ones(2), np.ones(3), TENTH).is_within
    assert not missing_check("whole model", "x", Tolerance("relative", None), "only PyTorch has it").is_within


def test_next_token_agreement():
    reference = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]]))
    ours = (
        np.log(np.array([[0.25, 0.5, 0.125, 0.0625, 0.03125, 0.03125]])) + 7
    )  # a constant does not change the distribution
    found = NextTokenAgreement.from_logits(ours, reference, np.array([3]))
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert not found.same_top1[0]
    same = NextTokenAgreement.from_logits(reference, reference, np.array([3]))
    assert (same.kl[0], same.same_top1[0], same.same_top5[0]) == (0, True, 1)


def test_inputs_are_left_padded():
    inputs = Inputs.from_rows([[5, 6, 7], [8]])
    assert inputs.tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs.positions.tolist() == [[0, 1, 2], [-2, -1, 0]]
    assert inputs.rows() == [[5, 6, 7], [8]]
    assert inputs.last_tokens(2).rows() == [[6, 7], [8]]
    assert [len(row) for row in random_tokens(311, 10, 3).rows()] == [10, 8, 6]


def test_options_list_every_problem():
    with pytest.raises(UsageError) as error:
        ParityOptions("x", dtype="float16", prompts=("a",), tokens=1)
    for text in ("float16", "float64, float32, bfloat16", "prompts and tokens", "at least 2"):
        assert text in str(error.value)


def test_json_has_no_numbers_that_are_not_finite():
    from qwen_dist.parity.checks import ParityReport

    checks = [missing_check("parameters", "x", TENTH, "only PyTorch has it")]
    report = ParityReport({}, checks, NextTokenAgreement.from_logits(np.eye(6), np.eye(6), np.arange(6)), np.zeros((0, 2)))
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["rows"][0]["measured"] == "inf"
