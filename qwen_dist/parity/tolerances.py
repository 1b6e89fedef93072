"""How far this project may be from PyTorch, by dtype and by what is compared."""

from __future__ import annotations

import dataclasses
from typing import Literal

Section = Literal["parameters", "same inputs", "whole model", "decode", "gradient"]
Metric = Literal["max_abs", "relative", "differing", "ratio", "kl"]
DTYPES = ("float64", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """A metric and the largest value it may have (its bound); None: the value is reported and not judged."""

    metric: Metric
    limit: float | None


EXACT = Tolerance("max_abs", 0.0)
REPORT_ONLY = Tolerance("relative", None)
# The experts of each token: indices, which are equal or not.
ROUTING, ROUTING_REPORT_ONLY = Tolerance("differing", 0.0), Tolerance("differing", None)
_FLOAT64 = Tolerance("max_abs", 1e-10)
TOLERANCES: dict[str, dict[Section, Tolerance]] = {
    "float64": dict.fromkeys(("same inputs", "whole model", "decode", "gradient"), _FLOAT64),
    "float32": {
        "same inputs": Tolerance("relative", 1e-6),
        "whole model": Tolerance("relative", 1e-5),
        "decode": Tolerance("relative", 1e-5),
        # PyTorch's float32 log-softmax over 150,000 tokens has an error of 5e-6, which becomes 3e-4 of the gradient.
        "gradient": Tolerance("relative", 1e-3),
    },
}
# Attention scores of Qwen2.5 reach thousands, and exp turns their relative error into an absolute one: PyTorch's own
# float32 attention weights have an error of 2e-5. The attention itself is judged where it is given the same inputs.
_FLOAT32_ATTENTION_WEIGHTS = Tolerance("relative", 1e-4)
# A delta net's state sums over all tokens before: where keys repeat, PyTorch's own float32 state has an error of 1e-6.
_FLOAT32_RECURRENCE = Tolerance("relative", 5e-6)
MAX_MEAN_KL = 1e-3
# In float32, of the whole model where it amplifies rounding: this side's distance from float64 divided by PyTorch's.
MAX_ERROR_RATIO = 1.2


def tolerance_for(dtype: str, section: Section, name: str) -> Tolerance:
    """Return how far a component may differ from PyTorch's in the same dtype."""
    if name == "embed_tokens":
        return EXACT
    if name.endswith(".chosen"):
        return ROUTING_REPORT_ONLY if dtype == "bfloat16" else ROUTING
    if dtype == "bfloat16":
        # Norms round at the same places: they are equal except where another order of the float32 sum rounds differently.
        # A delta net's norm does not: its weight is float32 here, and PyTorch rounds it.
        is_equal = section == "same inputs" and name.endswith("norm") and not name.endswith("linear_attn.norm")
        return Tolerance("differing", 0.01) if is_equal else REPORT_ONLY
    if dtype == "float32" and section == "whole model" and name.endswith(".weights"):
        return _FLOAT32_ATTENTION_WEIGHTS
    if dtype == "float32" and section == "same inputs" and (is_state(name) or name.endswith("linear_attn.core")):
        return _FLOAT32_RECURRENCE
    return TOLERANCES[dtype][section]


def is_state(name: str) -> bool:
    """Return whether an intermediate is the state of a recurrent layer, which is of a row and not of its tokens."""
    return name.rpartition(".")[2].startswith("state_")
