"""The float64 and float32 comparisons: both sides compute in one dtype, and are equal up to rounding.

Some models amplify rounding: four layers of a recurrence with random weights make 1e-7 into 2e-5, on both sides. Where a
component of the whole model is beyond its bound in float32, its distance from PyTorch in float64 is judged instead: it may
be at most 1.2 times that of PyTorch in float32, over all tokens of eight rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qwen_dist.parity.candidate import Candidate
from qwen_dist.parity.checks import Check, ParityReport
from qwen_dist.parity.comparison import Comparison, decode_step_name, prefill_chunk_length
from qwen_dist.parity.oracle import MIN_ROWS
from qwen_dist.parity.reference import Reference
from qwen_dist.parity.tolerances import MAX_ERROR_RATIO


def compare_in_same_dtype(comparison: Comparison) -> ParityReport:
    """Compare all intermediates, logits, gradients and the decoding of this side with PyTorch's in the same dtype."""
    comparison.progress("PyTorch")
    reference = Reference(comparison.options.model, comparison.options.dtype)
    outputs = comparison.run_reference(reference)
    comparison.progress("loading the checkpoint here, and its parameters")
    candidate = comparison.load()
    comparison.compare_parameters(candidate, reference.parameters())
    del reference  # the gradients of a large model need its memory
    for stage in comparison.stages(candidate, outputs):
        comparison.progress(stage)
    if comparison.options.dtype == "float32":
        _judge_by_error(comparison, candidate)
    return comparison.report()


def _judge_by_error(comparison: Comparison, candidate: Candidate) -> None:
    """Judge what is beyond its bound in the whole model by the ratio of this side's error and PyTorch's.

    Both errors are measured against PyTorch in float64, over at least MIN_ROWS rows. With fewer prompts of the user, the
    bound stays.
    """
    beyond = {
        number: check
        for number, check in enumerate(comparison.checks)
        if check.section in ("whole model", "decode") and check.metric == "relative" and not check.is_within
    }
    if not beyond:
        return
    rows = Comparison(comparison.options, comparison.config, comparison.progress, num_rows=MIN_ROWS)
    if len(rows.inputs.tokens) < MIN_ROWS:
        return
    comparison.progress(f"the errors of both sides, over {len(rows.inputs.tokens)} rows")
    ratios = dict(_error_ratios(rows, candidate))
    for number, check in beyond.items():
        ratio = ratios[check.name.removesuffix(".against_full_forward")]
        where = "" if ratio <= MAX_ERROR_RATIO else check.where
        comparison.checks[number] = Check(
            check.section, check.name, "ratio", ratio, MAX_ERROR_RATIO, check.difference, where
        )
    comparison.facts["judged by its error, as rounding is amplified"] = f"{len(beyond)} of the whole model and of decoding"


def _error_ratios(rows: Comparison, candidate: Candidate) -> Iterator[tuple[str, float]]:
    """Yield the name of each intermediate and step of decoding, and this side's error divided by PyTorch's."""
    model, num_steps = rows.options.model, rows.options.decode_steps
    exact_model, baseline_model = Reference(model, "float64"), Reference(model, "float32")
    exact, baseline = (one.forward(rows.inputs, rows.columns) for one in (exact_model, baseline_model))
    actual = candidate.forward(rows.inputs, rows.columns)
    for name in exact:
        if not name.endswith(".chosen"):
            yield name, _error_ratio(*(rows.at_real_tokens(name, side) for side in (actual, baseline, exact)))
    tokens, exact_logits = exact_model.decode(rows.inputs, num_steps, None)
    _, baseline_logits = baseline_model.decode(rows.inputs, num_steps, tokens)
    logits, _ = candidate.decode(rows.inputs, tokens, prefill_chunk_length(rows.inputs))
    for step in range(num_steps):
        yield decode_step_name(step), _error_ratio(logits[:, step], baseline_logits[:, step], exact_logits[:, step])


def _error_ratio(ours: np.ndarray, baseline: np.ndarray, exact: np.ndarray) -> float:
    """Return ‖ours - exact‖ / ‖baseline - exact‖ over all rows together, so that a single wrong row shows."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(baseline - exact))
