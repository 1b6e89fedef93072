"""How far this project may be from PyTorch, by dtype and by what is compared."""

from __future__ import annotations

import dataclasses
from typing import Literal

Section = Literal["parameters", "same inputs", "whole model", "decode", "gradient"]
Metric = Literal["max_abs", "relative", "differing", "ratio", "kl"]
DTYPES = ("float64", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Bound:
    """The largest value that a metric may have; None: it is reported and not judged."""

    metric: Metric
    limit: float | None


EXACT = Bound("max_abs", 0.0)
REPORTED = Bound("relative", None)
# Which experts a token goes to; a choice is the same or another one.
CHOICES, CHOICES_REPORTED = Bound("differing", 0.0), Bound("differing", None)
_IN_FLOAT64 = Bound("max_abs", 1e-10)
BOUNDS: dict[str, dict[Section, Bound]] = {
    "float64": dict.fromkeys(("same inputs", "whole model", "decode", "gradient"), _IN_FLOAT64),
    "float32": {
        "same inputs": Bound("relative", 1e-6),
        "whole model": Bound("relative", 1e-5),
        "decode": Bound("relative", 1e-5),
        # PyTorch's float32 log-softmax over 150,000 tokens is off by 5e-6, which makes 3e-4 of the gradient.
        "gradient": Bound("relative", 1e-3),
    },
}
# Scores of Qwen2.5 reach thousands, and exp turns an error relative to that into one relative to 1: PyTorch's own float32
# weights are 2e-5 from the exact ones. What the attention itself adds is judged where it is given the same inputs.
_ATTENTION_WEIGHTS_IN_FLOAT32 = Bound("relative", 1e-4)
MAX_MEAN_KL = 1e-3


def bound_of(dtype: str, section: Section, name: str) -> Bound:
    """What a component may differ by from PyTorch's in the same dtype."""
    if name == "embed_tokens":
        return EXACT
    if name.endswith(".chosen"):
        return CHOICES_REPORTED if dtype == "bfloat16" else CHOICES
    if dtype == "bfloat16":
        # Rounded at the same places a norm is the same number, but where float32 sums in another order round differently.
        return Bound("differing", 0.01) if section == "same inputs" and name.endswith("norm") else REPORTED
    if dtype == "float32" and section == "whole model" and name.endswith(".weights"):
        return _ATTENTION_WEIGHTS_IN_FLOAT32
    return BOUNDS[dtype][section]
