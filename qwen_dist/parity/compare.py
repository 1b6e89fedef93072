"""How far two arrays are apart, what is allowed, and what a run of comparisons amounts to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qwen_dist.parity.bounds import Bound, Metric, Section

# What is compared, in the order in which a fault should be looked for.
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
_PIECE = 1 << 22  # elements looked at in one go, so that comparing an embedding takes no gigabytes


@dataclasses.dataclass(frozen=True)
class Difference:
    """Δ = ours - reference, measured in float64.

    max_abs: largest |Δ|. max_rel: largest |Δ/ref|, infinite where a zero is missed. relative: ‖Δ‖/‖ref‖. max_ulp: largest
    |Δ| in units of ref's last place; None for integers and where the two types differ. differing: share of elements that
    are not equal. cosine: of the angle between the two arrays.
    """

    max_abs: float
    max_rel: float
    relative: float
    max_ulp: float | None
    differing: float
    cosine: float


def difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    """Measure ours - reference; shapes must be equal. What is not finite makes a difference that is not either."""
    assert ours.shape == reference.shape, f"{ours.shape} and {reference.shape}"
    max_abs = max_rel = max_ulp = 0.0
    is_float = not np.issubdtype(reference.dtype, np.integer)
    differing = 0
    squares = np.zeros(4)  # of Δ, ours, reference; and ours times reference
    for _, a, b in _pieces(ours, reference):
        delta = np.abs(a - b)
        wrong = delta != 0
        differing += int(wrong.sum())
        squares += [delta @ delta, a @ a, b @ b, a @ b]
        if wrong.any():
            with np.errstate(divide="ignore", over="ignore"):
                max_abs = _worst(max_abs, delta)
                max_rel = _worst(max_rel, delta[wrong] / np.abs(b[wrong]))
                max_ulp = _worst(max_ulp, delta[wrong] / _last_place(b[wrong], reference.dtype)) if is_float else 0.0
    error, own, norm, product = squares.tolist()
    return Difference(
        max_abs=max_abs,
        max_rel=max_rel,
        relative=0.0 if error == 0 else math.sqrt(error / norm) if norm > 0 else math.inf,
        max_ulp=max_ulp if is_float and ours.dtype == reference.dtype else None,
        differing=differing / max(1, ours.size),
        cosine=1.0 if error == 0 else product / math.sqrt(own * norm) if own * norm > 0 else math.nan,
    )


def first_beyond(ours: np.ndarray, reference: np.ndarray, threshold: float) -> tuple[int, ...] | None:
    """The index of the first element that is not within `threshold` of the reference."""
    for start, a, b in _pieces(ours, reference):
        wrong = ~(np.abs(a - b) <= threshold)
        if wrong.any():
            return tuple(int(i) for i in np.unravel_index(start + int(wrong.argmax()), ours.shape))
    return None


def _pieces(ours: np.ndarray, reference: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    a, b = ours.reshape(-1), reference.reshape(-1)
    for start in range(0, a.size, _PIECE):
        stop = start + _PIECE
        yield start, a[start:stop].astype(np.float64), b[start:stop].astype(np.float64)


def _worst(so_far: float, values: np.ndarray) -> float:
    worst = float(values.max())  # NaN when there is one
    return worst if math.isnan(worst) else max(so_far, worst)


def _last_place(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    _, exponents = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponents - 1, info.minexp) - info.nmant)


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing compared. `where` says where it first goes beyond its bound, and is empty when it does not."""

    section: Section
    name: str
    metric: Metric
    measured: float
    limit: float | None
    difference: Difference | None = None
    where: str = ""

    @property
    def is_within(self) -> bool:
        return self.limit is None or self.measured <= self.limit  # a NaN is not

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", the bound is {self.limit:.3g}"
        where = f", first at {self.where}" if self.where else ""
        return f"{self.name} ({self.section}): {METRICS[self.metric]} is {self.measured:.3g}{limit}{where}"


def row(
    section: Section, name: str, ours: np.ndarray, reference: np.ndarray, bound: Bound, tokens: Sequence[str] = ()
) -> Row:
    """Compare two arrays. `tokens` names the entries of the first dimension, where they are tokens."""
    if ours.shape != reference.shape:
        where = f"shape {list(ours.shape)}, the reference has {list(reference.shape)}"
        return Row(section, name, bound.metric, math.inf, bound.limit, None, where)
    found = difference(ours, reference)
    measured = float(getattr(found, bound.metric))
    result = Row(section, name, bound.metric, measured, bound.limit, found)
    return result if result.is_within else dataclasses.replace(result, where=_where(ours, reference, bound, tokens))


def _where(ours: np.ndarray, reference: np.ndarray, bound: Bound, tokens: Sequence[str]) -> str:
    assert bound.limit is not None
    scale = {"max_abs": 1.0, "relative": float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))), "differing": 0.0}
    index = first_beyond(ours, reference, bound.limit * scale[bound.metric])
    if index is None:
        return ""
    place = f"{tokens[index[0]]}, element {list(index[1:])}" if tokens else f"element {list(index)}"
    return f"{place}: {float(ours[index])!r} instead of {float(reference[index])!r}"


def missing(section: Section, name: str, bound: Bound, whose: str) -> Row:
    """A row for what only one side has."""
    return Row(section, name, bound.metric, math.inf, bound.limit if bound.limit is not None else 0.0, None, whose)


def first_fault(rows: Sequence[Row]) -> Row | None:
    """The first row beyond its bound, in the order in which a fault should be looked for."""
    return next((row for section in SECTIONS for row in rows if row.section == section and not row.is_within), None)


@dataclasses.dataclass(frozen=True)
class Distributions:
    """The next-token distributions of both sides, at every token that was compared: one entry each.

    kl: KL(reference ‖ ours) in nats. same_top1, same_top5: whether the likeliest token agrees, and which share of the five
    likeliest.
    """

    position: np.ndarray
    kl: np.ndarray
    same_top1: np.ndarray
    same_top5: np.ndarray

    @classmethod
    def of(cls, ours: np.ndarray, reference: np.ndarray, positions: np.ndarray) -> Distributions:
        """From logits [tokens, V] of both sides and each token's position in its row."""
        kl, top1, top5 = [], [], []
        for a, b in zip(ours, reference, strict=True):  # a row at a time: the vocabulary is large
            a, b = _log_softmax(a), _log_softmax(b)
            kl.append(max(0.0, float(np.sum(np.exp(b) * (b - a)))))
            five_a, five_b = np.argpartition(a, -5)[-5:], np.argpartition(b, -5)[-5:]
            top1.append(int(a.argmax()) == int(b.argmax()))
            top5.append(len(np.intersect1d(five_a, five_b)) / 5)
        return cls(positions, np.array(kl), np.array(top1), np.array(top5))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max()
    return wide - np.log(np.exp(wide).sum())


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Everything a run found. `facts` describe the run (checkpoint, versions, sizes) and hold figures without a bound."""

    facts: dict[str, str]
    rows: list[Row]
    distributions: Distributions
    scatter: np.ndarray  # some logits: (reference, ours) pairs [points, 2]

    @property
    def ok(self) -> bool:
        return self.first_fault is None

    @property
    def first_fault(self) -> Row | None:
        """The first row beyond its bound, in the order in which to look for a fault."""
        return first_fault(self.rows)

    def verdict(self) -> str:
        """One line: all within bounds, or the first component that is off and by how much."""
        fault = self.first_fault
        if fault is None:
            judged = sum(row.limit is not None for row in self.rows)
            return f"within bounds: {judged} comparisons, none beyond"
        beyond = sum(not row.is_within for row in self.rows)
        return f"beyond bounds: {fault} ({beyond} of {len(self.rows)} comparisons are beyond)"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; what is not finite is given as a string, which JSON has no number for."""
        rows = [dataclasses.asdict(row) | {"is_within": row.is_within} for row in self.rows]
        positions = {
            field.name: getattr(self.distributions, field.name).tolist() for field in dataclasses.fields(Distributions)
        }
        return _finite({"ok": self.ok, "verdict": self.verdict(), "facts": self.facts, "rows": rows, "tokens": positions})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
