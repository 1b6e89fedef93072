"""Measure the difference of two arrays, check it against a tolerance, and collect the checks of a run in a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qwen_dist.parity.tolerances import Metric, Section, Tolerance

# In the order in which to look for an error.
SECTIONS: dict[Section, str] = {
    "parameters": "every parameter as loaded",
    "same inputs": "each component, given the reference's own inputs",
    "whole model": "each component, errors accumulating from the embedding on",
    "decode": "greedy decoding with the cache, prompts in chunks, step by step",
    "gradient": "the loss, and its gradient by every parameter",
}
METRICS: dict[Metric, str] = {
    "max_abs": "max |Δ|",
    "relative": "‖Δ‖/‖ref‖",
    "differing": "share that differs",
    "ratio": "error ÷ PyTorch's",
    "kl": "mean KL",
}
_BLOCK_SIZE = 1 << 22  # elements compared at a time, so that an embedding does not need gigabytes of float64


@dataclasses.dataclass(frozen=True)
class Difference:
    """Measures of Δ = ours - reference, in float64.

    Attributes:
      max_abs: largest |Δ|.
      max_rel: largest |Δ/ref|; infinite where the reference is 0 and ours is not.
      relative: ‖Δ‖/‖ref‖.
      max_ulp: largest |Δ| in units in the last place of ref; None for integers and if the two dtypes differ.
      differing: fraction of elements that are not equal.
      cosine: cosine similarity of the two arrays.
    """

    max_abs: float
    max_rel: float
    relative: float
    max_ulp: float | None
    differing: float
    cosine: float


def difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    """Measure ours - reference. The shapes must be equal. Values that are not finite give measures that are not finite."""
    assert ours.shape == reference.shape, f"{ours.shape} and {reference.shape}"
    max_abs = max_rel = max_ulp = 0.0
    is_float = not np.issubdtype(reference.dtype, np.integer)
    differing = 0
    squares = np.zeros(4)  # of Δ, ours, reference; and ours times reference
    for _, a, b in _blocks(ours, reference):
        delta = np.abs(a - b)
        wrong = delta != 0
        differing += int(wrong.sum())
        squares += [delta @ delta, a @ a, b @ b, a @ b]
        if wrong.any():
            with np.errstate(divide="ignore", over="ignore"):
                max_abs = _max_or_nan(max_abs, delta)
                max_rel = _max_or_nan(max_rel, delta[wrong] / np.abs(b[wrong]))
                max_ulp = _max_or_nan(max_ulp, delta[wrong] / _ulp(b[wrong], reference.dtype)) if is_float else 0.0
    error, own, norm, product = squares.tolist()
    return Difference(
        max_abs=max_abs,
        max_rel=max_rel,
        relative=0.0 if error == 0 else math.sqrt(error / norm) if norm > 0 else math.inf,
        max_ulp=max_ulp if is_float and ours.dtype == reference.dtype else None,
        differing=differing / max(1, ours.size),
        cosine=1.0 if error == 0 else product / math.sqrt(own * norm) if own * norm > 0 else math.nan,
    )


def first_exceeding(ours: np.ndarray, reference: np.ndarray, threshold: float) -> tuple[int, ...] | None:
    """Return the index of the first element that is not within `threshold` of the reference, or None."""
    for start, a, b in _blocks(ours, reference):
        wrong = ~(np.abs(a - b) <= threshold)
        if wrong.any():
            return tuple(int(i) for i in np.unravel_index(start + int(wrong.argmax()), ours.shape))
    return None


def _blocks(ours: np.ndarray, reference: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    a, b = ours.reshape(-1), reference.reshape(-1)
    for start in range(0, a.size, _BLOCK_SIZE):
        stop = start + _BLOCK_SIZE
        yield start, a[start:stop].astype(np.float64), b[start:stop].astype(np.float64)


def _max_or_nan(so_far: float, values: np.ndarray) -> float:
    worst = float(values.max())  # NaN when there is one
    return worst if math.isnan(worst) else max(so_far, worst)


def _ulp(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    _, exponents = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponents - 1, info.minexp) - info.nmant)


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
      section: of the report.
      name: the component, parameter or step.
      metric: what is judged.
      measured: the value of the metric.
      limit: the largest value allowed; None if the value is only reported.
      difference: all measures of the two arrays, if there are two.
      where: the first place beyond the limit; empty if there is none.
    """

    section: Section
    name: str
    metric: Metric
    measured: float
    limit: float | None
    difference: Difference | None = None
    where: str = ""

    @property
    def is_within(self) -> bool:
        return self.limit is None or self.measured <= self.limit  # False for NaN

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", the bound is {self.limit:.3g}"
        where = f", first at {self.where}" if self.where else ""
        return f"{self.name} ({self.section}): {METRICS[self.metric]} is {self.measured:.3g}{limit}{where}"


def check(
    section: Section, name: str, ours: np.ndarray, reference: np.ndarray, tolerance: Tolerance, tokens: Sequence[str] = ()
) -> Check:
    """Compare two arrays.

    Args:
      section: of the report.
      name: of what is compared.
      ours: this project's array.
      reference: the array to compare with.
      tolerance: the metric and its limit.
      tokens: names of the entries of the first dimension, if they are tokens.
    """
    if ours.shape != reference.shape:
        where = f"shape {list(ours.shape)}, the reference has {list(reference.shape)}"
        return Check(section, name, tolerance.metric, math.inf, tolerance.limit, None, where)
    found = difference(ours, reference)
    measured = float(getattr(found, tolerance.metric))
    result = Check(section, name, tolerance.metric, measured, tolerance.limit, found)
    return result if result.is_within else dataclasses.replace(result, where=_where(ours, reference, tolerance, tokens))


def _where(ours: np.ndarray, reference: np.ndarray, tolerance: Tolerance, tokens: Sequence[str]) -> str:
    assert tolerance.limit is not None
    scale = {"max_abs": 1.0, "relative": float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))), "differing": 0.0}
    index = first_exceeding(ours, reference, tolerance.limit * scale[tolerance.metric])
    if index is None:
        return ""
    place = f"{tokens[index[0]]}, element {list(index[1:])}" if tokens else f"element {list(index)}"
    return f"{place}: {float(ours[index])!r} instead of {float(reference[index])!r}"


def missing_check(section: Section, name: str, tolerance: Tolerance, whose: str) -> Check:
    """Return a failed check for an array that only one side has; `whose` says which."""
    return Check(
        section, name, tolerance.metric, math.inf, tolerance.limit if tolerance.limit is not None else 0.0, None, whose
    )


def first_failure(checks: Sequence[Check]) -> Check | None:
    """Return the first failed check, in the order in which to look for an error."""
    return next(
        (check for section in SECTIONS for check in checks if check.section == section and not check.is_within), None
    )


@dataclasses.dataclass(frozen=True)
class NextTokenAgreement:
    """How far the next-token distributions of both sides agree: arrays with one entry per compared token.

    Attributes:
      position: of the token in its row.
      kl: KL(reference ‖ ours) in nats.
      same_top1: whether the likeliest token is the same.
      same_top5: the fraction of the five likeliest tokens that both sides share.
    """

    position: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray
    same_top5: np.ndarray

    @classmethod
    def from_logits(cls, ours: np.ndarray, reference: np.ndarray, positions: np.ndarray) -> NextTokenAgreement:
        """Compare logits [tokens, V] of both sides, at these positions [tokens]."""
        kl, top1, top5 = [], [], []
        for a, b in zip(ours, reference, strict=True):  # one token at a time: the vocabulary is large
            a, b = _log_softmax(a), _log_softmax(b)
            kl.append(max(0.0, float(np.sum(np.exp(b) * (b - a)))))
            five_a, five_b = np.argpartition(a, -5)[-5:], np.argpartition(b, -5)[-5:]
            top1.append(int(a.argmax()) == int(b.argmax()))
            top5.append(len(np.intersect1d(five_a, five_b)) / 5)
        return cls(positions, np.array(kl), np.array(top1), np.array(top5))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits64 = logits.astype(np.float64)
    logits64 = logits64 - logits64.max()
    return logits64 - np.log(np.exp(logits64).sum())


# The fact that says what a report could not judge.
NOT_JUDGED = "not judged"


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """All results of a run.

    Attributes:
      facts: the checkpoint, the versions, the sizes, and measures without a limit.
      checks: all comparisons.
      next_token: agreement of the next-token distributions.
      logit_pairs: a sample of (reference, ours) logits, [points, 2].
    """

    facts: dict[str, str]
    checks: list[Check]
    next_token: NextTokenAgreement
    logit_pairs: np.ndarray

    @property
    def ok(self) -> bool:
        return self.first_failure is None

    @property
    def is_judged(self) -> bool:
        """Whether the main criterion was judged."""
        return NOT_JUDGED not in self.facts

    @property
    def first_failure(self) -> Check | None:
        """The first failed check, in the order in which to look for an error."""
        return first_failure(self.checks)

    def verdict(self) -> str:
        """Return one line: all within bounds, or the first component beyond its bound and by how much."""
        failure = self.first_failure
        if failure is None:
            if NOT_JUDGED in self.facts:
                return f"not judged: {self.facts[NOT_JUDGED]}"
            judged = sum(check.limit is not None for check in self.checks)
            return f"within bounds: {judged} comparisons, none beyond"
        beyond = sum(not check.is_within for check in self.checks)
        return f"beyond bounds: {failure} ({beyond} of {len(self.checks)} comparisons are beyond)"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dumps`; values that are not finite become strings, as JSON has no such numbers."""
        rows = [dataclasses.asdict(check) | {"is_within": check.is_within} for check in self.checks]
        positions = {
            field.name: getattr(self.next_token, field.name).tolist() for field in dataclasses.fields(NextTokenAgreement)
        }
        return _finite({"ok": self.ok, "verdict": self.verdict(), "facts": self.facts, "rows": rows, "tokens": positions})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
