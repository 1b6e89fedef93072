"""The bfloat16 comparison: both sides round differently, so it compares their errors, measured against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qwen_dist.parity.checks import NOT_JUDGED, Check, NextTokenAgreement, ParityReport, check, difference
from qwen_dist.parity.comparison import Comparison, Intermediates, ReferenceOutputs, backward_order, without_logits
from qwen_dist.parity.reference import Reference
from qwen_dist.parity.tolerances import MAX_MEAN_KL, ROUTING_REPORT_ONLY, is_state

# With fewer rows the standard error is not reliable, so the ratios are reported and not judged.
MIN_ROWS = 8


def compare_bfloat16(comparison: Comparison) -> ParityReport:
    """Compare this project's bfloat16 error with PyTorch's, both measured against the float64 oracle.

    PyTorch runs with its default attention (`sdpa`) and with `eager`; the limits refer to the default. Norms, which both
    sides round at the same places, must also be equal, given the same inputs.
    """
    model, inputs, columns = comparison.options.model, comparison.inputs, comparison.columns
    comparison.progress("PyTorch in float64")
    oracle = comparison.run_reference(Reference(model, "float64"), in_float32=True)
    comparison.progress("PyTorch in bfloat16")
    sdpa = comparison.run_reference(Reference(model, "bfloat16", "sdpa"), oracle.decoded_tokens)
    eager_model = Reference(model, "bfloat16", "eager")
    eager = eager_model.forward(inputs, columns)
    comparison.progress("this project in bfloat16")
    candidate = comparison.load()
    comparison.compare_parameters(candidate, eager_model.parameters())
    if comparison.has_all_columns:
        actual = candidate.forward(inputs, columns, replacing=without_logits(eager))
        comparison.compare_intermediates("same inputs", actual, eager)
    actual = candidate.forward(inputs, columns)
    _judge_components(comparison, actual, oracle, sdpa, eager)
    comparison.report_routing(actual, oracle.intermediates)
    comparison.compare_next_token(actual, oracle.intermediates)
    _judge_next_token(comparison, actual, oracle, sdpa)
    _judge_decoding(comparison, comparison.compare_decoding(candidate, sdpa), oracle, sdpa)
    _report_gradients(comparison, candidate.gradient(comparison.gradient_inputs), oracle, sdpa)
    return comparison.report()


def _judge_components(
    comparison: Comparison, actual: Intermediates, oracle: ReferenceOutputs, sdpa: ReferenceOutputs, eager: Intermediates
) -> None:
    """Divide each component's error by PyTorch's; only the ratio of the logits has a limit."""
    for name in oracle.intermediates:
        if name.endswith(".chosen"):
            ours, exact = (comparison.at_real_tokens(name, values) for values in (actual, oracle.intermediates))
            comparison.checks.append(check("whole model", name, ours, exact, ROUTING_REPORT_ONLY))
            continue
        baseline = sdpa.intermediates if name in sdpa.intermediates else eager  # sdpa has no attention weights
        ratio, error = _error_ratio_of(comparison, name, actual, baseline, oracle.intermediates)
        limit = _limit(comparison, error) if name == "logits" else None
        delta = difference(comparison.at_real_tokens(name, actual), comparison.at_real_tokens(name, oracle.intermediates))
        comparison.checks.append(Check("whole model", name, "ratio", ratio, limit, delta))
    ratio, error = _error_ratio_of(comparison, "logits", actual, eager, oracle.intermediates)
    comparison.facts["logits, error ÷ PyTorch's with eager attention"] = (
        f"{ratio:.3f} ± {error:.3f}" if math.isfinite(error) else f"{ratio:.3f}"
    )
    if len(comparison.inputs.tokens) < MIN_ROWS:
        comparison.facts[NOT_JUDGED] = (
            f"the error of logits and decoding: at least {MIN_ROWS} rows are needed, and there are "
            f"{len(comparison.inputs.tokens)}; repeat --prompt, or give none"
        )


def _error_ratio_of(
    comparison: Comparison, name: str, actual: Intermediates, baseline: Intermediates, oracle: Intermediates
) -> tuple[float, float]:
    ours, other, exact = (comparison.by_token(name, values) for values in (actual, baseline, oracle))
    return error_ratio(ours, other, exact, np.ones(exact.shape[:2], bool) if is_state(name) else comparison.is_compared)


def _judge_next_token(
    comparison: Comparison, actual: Intermediates, oracle: ReferenceOutputs, sdpa: ReferenceOutputs
) -> None:
    assert comparison.next_token is not None
    kl = comparison.next_token.kl
    positions = comparison.next_token.position
    baseline, exact = (comparison.at_real_tokens("logits", values) for values in (sdpa.intermediates, oracle.intermediates))
    baseline_kl = NextTokenAgreement.from_logits(baseline, exact, positions).kl
    # Where rounding is amplified, as by a recurrence with random weights, PyTorch's own distance is the bound.
    noise = 2 * float(np.std(kl - baseline_kl)) / math.sqrt(kl.size)
    limit = max(MAX_MEAN_KL, float(baseline_kl.mean()) + noise)
    comparison.checks.append(Check("whole model", "next token", "kl", float(kl.mean()), limit))
    comparison.facts["mean KL of the next token, PyTorch's"] = f"{baseline_kl.mean():.3g} nats"
    same_routing = [_same_routing(comparison, values, oracle.intermediates) for values in (actual, sdpa.intermediates)]
    if not all(map(np.all, same_routing)):
        means = [
            f"{one[same].mean():.3g}" if same.any() else "none"
            for one, same in zip((kl, baseline_kl), same_routing, strict=True)
        ]
        fractions = [f"{same.mean():.1%}" for same in same_routing]
        comparison.facts["the same of tokens that go to the exact model's experts"] = (
            f"{means[0]} ({fractions[0]} of the tokens), PyTorch's {means[1]} ({fractions[1]})"
        )


def _same_routing(comparison: Comparison, actual: Intermediates, exact: Intermediates) -> np.ndarray:
    """Return which tokens go to the same experts in every layer, bool [tokens]."""
    same = np.ones(int(comparison.is_compared.sum()), bool)
    for name in (name for name in exact if name.endswith(".chosen")):
        ours, other = (np.sort(comparison.at_real_tokens(name, values)) for values in (actual, exact))
        same &= (ours == other).all(axis=-1)
    return same


def _judge_decoding(comparison: Comparison, decoded: np.ndarray, oracle: ReferenceOutputs, sdpa: ReferenceOutputs) -> None:
    all_steps = np.ones(decoded.shape[:2], bool)
    ratio, error = error_ratio(decoded, sdpa.decoded_logits, oracle.decoded_logits, all_steps)
    comparison.checks.append(Check("decode", "decode.all_steps", "ratio", ratio, _limit(comparison, error)))


def _limit(comparison: Comparison, error: float) -> float | None:
    """Return the limit of a ratio: 1 plus two standard errors."""
    return math.exp(2 * error) if len(comparison.inputs.tokens) >= MIN_ROWS else None


def _report_gradients(
    comparison: Comparison, actual: tuple[dict[str, float], Any], oracle: ReferenceOutputs, sdpa: ReferenceOutputs
) -> None:
    for name, loss in oracle.losses.items():
        error, baseline_error = abs(actual[0][name] - loss), abs(sdpa.losses[name] - loss)
        ratio = error / baseline_error if baseline_error else math.nan
        comparison.checks.append(Check("gradient", name, "ratio", ratio, None))
    squares = np.zeros(2)
    for name in backward_order(oracle):
        exact = oracle.gradients[name]
        delta = difference(np.asarray(actual[1][name]).reshape(exact.shape), exact)
        baseline = difference(sdpa.gradients[name], exact)
        comparison.checks.append(Check("gradient", name, "ratio", delta.relative / baseline.relative, None, delta))
        squares += np.square([delta.relative, baseline.relative]) * float(np.sum(np.square(exact, dtype=np.float64)))
    comparison.facts["gradient, error ÷ PyTorch's, all parameters together"] = f"{math.sqrt(squares[0] / squares[1]):.3f}"


def error_ratio(ours: np.ndarray, baseline: np.ndarray, oracle: np.ndarray, is_real: np.ndarray) -> tuple[float, float]:
    """Return ‖ours - oracle‖ / ‖baseline - oracle‖: its geometric mean over rows, and the standard error of its logarithm.

    Args:
      ours: [B, T, ...].
      baseline: [B, T, ...].
      oracle: [B, T, ...].
      is_real: bool [B, T], False for padding. If both errors of a row are equal, also 0, its ratio is 1.
    """
    logs = []
    for row in range(len(oracle)):
        exact = oracle[row][is_real[row]].astype(np.float64)
        own, other = (np.linalg.norm(side[row][is_real[row]].astype(np.float64) - exact) for side in (ours, baseline))
        with np.errstate(divide="ignore"):
            logs.append(0.0 if own == other else float(np.log(own / other)))
    error = float(np.std(logs, ddof=1) / math.sqrt(len(logs))) if len(logs) > 1 else math.nan
    return math.exp(np.mean(logs)), error
