"""bfloat16, where equal numbers cannot be asked for: whose error is larger, measured against float64?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qwen_dist.parity.bounds import CHOICES_REPORTED, MAX_MEAN_KL
from qwen_dist.parity.compare import Distributions, ParityReport, Row, difference
from qwen_dist.parity.compare import row as row_of
from qwen_dist.parity.comparison import Answers, Comparison, Values, backwards, without_logits
from qwen_dist.parity.reference import Reference

# Fewer rows give no standard error to speak of: then the ratios are reported and not judged.
MIN_ROWS = 8


def compare_with_truth(comparison: Comparison) -> ParityReport:
    """This project's bfloat16 error against PyTorch's own, both measured from the float64 model.

    PyTorch runs with its default attention (`sdpa`) and with `eager`; the default is what this side is judged by. What
    both sides round at the same places (norms) must also be the same numbers, given the same inputs.
    """
    model, inputs, columns = comparison.options.model, comparison.inputs, comparison.columns
    comparison.progress("PyTorch in float64")
    truth = comparison.ask(Reference(model, "float64"), in_float32=True)
    comparison.progress("PyTorch in bfloat16")
    sdpa = comparison.ask(Reference(model, "bfloat16", "sdpa"), truth.chosen)
    eager_model = Reference(model, "bfloat16", "eager")
    eager = eager_model.forward(inputs, columns)
    comparison.progress("this project in bfloat16")
    subject = comparison.load()
    comparison.compare_parameters(subject, eager_model.parameters())
    if comparison.has_all_columns:
        found = subject.forward(inputs, columns, replacing=without_logits(eager))
        comparison.compare_intermediates("same inputs", found, eager)
    found = subject.forward(inputs, columns)
    _judge_components(comparison, found, truth, sdpa, eager)
    comparison.report_routing(found, truth.values)
    comparison.compare_next_token(found, truth.values)
    _judge_next_token(comparison, found, truth, sdpa)
    _judge_decoding(comparison, comparison.compare_decoding(subject, sdpa), truth, sdpa)
    _report_gradients(comparison, subject.gradient(comparison.gradient_inputs), truth, sdpa)
    return comparison.report()


def _judge_components(comparison: Comparison, found: Values, truth: Answers, sdpa: Answers, eager: Values) -> None:
    """How much larger than PyTorch's each component's error is; only that of the logits has a bound."""
    for name in truth.values:
        if name.endswith(".chosen"):
            ours, exact = (comparison.tokens_of(name, values) for values in (found, truth.values))
            comparison.rows.append(row_of("whole model", name, ours, exact, CHOICES_REPORTED))
            continue
        rival = sdpa.values if name in sdpa.values else eager  # attention weights are never there under sdpa
        ratio, error = _error_ratio_of(comparison, name, found, rival, truth.values)
        limit = _limit(comparison, error) if name == "logits" else None
        far = difference(comparison.tokens_of(name, found), comparison.tokens_of(name, truth.values))
        comparison.rows.append(Row("whole model", name, "ratio", ratio, limit, far))
    ratio, error = _error_ratio_of(comparison, "logits", found, eager, truth.values)
    comparison.facts["logits, error ÷ PyTorch's with eager attention"] = f"{ratio:.3f} ± {error:.3f}"


def _error_ratio_of(comparison: Comparison, name: str, found: Values, rival: Values, truth: Values) -> tuple[float, float]:
    ours, other, exact = (comparison.by_token(name, values) for values in (found, rival, truth))
    return error_ratio(ours, other, exact, comparison.is_compared)


def _judge_next_token(comparison: Comparison, found: Values, truth: Answers, sdpa: Answers) -> None:
    assert comparison.distributions is not None
    kl = comparison.distributions.kl
    comparison.rows.append(Row("whole model", "next token", "kl", float(kl.mean()), MAX_MEAN_KL))
    positions = comparison.distributions.position
    rival, exact = (comparison.tokens_of("logits", values) for values in (sdpa.values, truth.values))
    of_rival = Distributions.of(rival, exact, positions).kl
    comparison.facts["mean KL of the next token, PyTorch's"] = f"{of_rival.mean():.3g} nats"
    routed = [_routed_alike(comparison, values, truth.values) for values in (found, sdpa.values)]
    if not all(map(np.all, routed)):
        means = [
            f"{one[same].mean():.3g}" if same.any() else "none" for one, same in zip((kl, of_rival), routed, strict=True)
        ]
        shares = [f"{same.mean():.1%}" for same in routed]
        comparison.facts["the same of tokens that go to the exact model's experts"] = (
            f"{means[0]} ({shares[0]} of the tokens), PyTorch's {means[1]} ({shares[1]})"
        )


def _routed_alike(comparison: Comparison, found: Values, exact: Values) -> np.ndarray:
    """Which tokens go to the same experts in every layer."""
    same = np.ones(int(comparison.is_compared.sum()), bool)
    for name in (name for name in exact if name.endswith(".chosen")):
        ours, other = (np.sort(comparison.tokens_of(name, values)) for values in (found, exact))
        same &= (ours == other).all(axis=-1)
    return same


def _judge_decoding(comparison: Comparison, decoded: np.ndarray, truth: Answers, sdpa: Answers) -> None:
    everything = np.ones(decoded.shape[:2], bool)
    ratio, error = error_ratio(decoded, sdpa.decoded, truth.decoded, everything)
    comparison.rows.append(Row("decode", "decode.all_steps", "ratio", ratio, _limit(comparison, error)))


def _limit(comparison: Comparison, error: float) -> float | None:
    """1, and twice the standard error of a ratio that would be 1."""
    return math.exp(2 * error) if len(comparison.inputs.tokens) >= MIN_ROWS else None


def _report_gradients(comparison: Comparison, found: tuple[dict[str, float], Any], truth: Answers, sdpa: Answers) -> None:
    for name, loss in truth.losses.items():
        error, of_rival = abs(found[0][name] - loss), abs(sdpa.losses[name] - loss)
        comparison.rows.append(Row("gradient", name, "ratio", error / of_rival if of_rival else math.nan, None))
    squares = np.zeros(2)
    for name in backwards(truth):
        exact = truth.gradients[name]
        far = difference(np.asarray(found[1][name]).reshape(exact.shape), exact)
        rival = difference(sdpa.gradients[name], exact)
        comparison.rows.append(Row("gradient", name, "ratio", far.relative / rival.relative, None, far))
        squares += np.square([far.relative, rival.relative]) * float(np.sum(np.square(exact, dtype=np.float64)))
    comparison.facts["gradient, error ÷ PyTorch's, all parameters together"] = f"{math.sqrt(squares[0] / squares[1]):.3f}"


def error_ratio(ours: np.ndarray, rival: np.ndarray, truth: np.ndarray, is_real: np.ndarray) -> tuple[float, float]:
    """‖ours - truth‖ / ‖rival - truth‖: the geometric mean over rows and the standard error of its logarithm.

    Arrays are [B, T, ...], `is_real` [B, T]. Where neither has an error the ratio is 1.
    """
    logs = []
    for row in range(len(truth)):
        exact = truth[row][is_real[row]].astype(np.float64)
        own, other = (np.linalg.norm(side[row][is_real[row]].astype(np.float64) - exact) for side in (ours, rival))
        with np.errstate(divide="ignore"):
            logs.append(0.0 if own == other else float(np.log(own / other)))
    error = float(np.std(logs, ddof=1) / math.sqrt(len(logs))) if len(logs) > 1 else math.nan
    return math.exp(np.mean(logs)), error
