"""What is asked of the engine and what it answers. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qwen_dist.errors import UsageError

MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop; the defaults are greedy and change no probability.

    In transformers' order: `repetition_penalty` divides the logits of tokens seen so far (multiplies negative ones);
    `temperature` divides the logits (0 takes the most probable token and ignores the rest); `top_k` keeps that many
    tokens (0: all); `top_p` the smallest set with that probability; `min_p` those at least that fraction as probable as
    the best. `seed` fixes the draws of this request, whoever else is in the batch. `logprobs` asks for the
    log-probability of each chosen token under the unmodified distribution, and of that many best alternatives;
    `prompt_logprobs` for the same of the prompt's tokens from the second on. With it `max_new_tokens` may be 0, which only
    scores the prompt.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        is_scored = self.prompt_logprobs is not None
        checks = {
            "max_new_tokens": (self.max_new_tokens >= (0 if is_scored else 1), "at least 1, or 0 to score the prompt"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "seed": (-(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "stop": (all(self.stop), "non-empty strings"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
        }
        wrong = [f"{name} is {getattr(self, name)!r}; it must be {rule}" for name, (ok, rule) in checks.items() if not ok]
        if wrong:
            raise UsageError("; ".join(wrong))

    @classmethod
    def from_generation_config(cls, generation: Mapping[str, Any]) -> SamplingParams:
        """What a checkpoint's `generation_config.json` asks for, read as transformers reads it.

        Without `do_sample` it is greedy, whatever the temperature. Raises UsageError for values out of range.
        """
        is_greedy = not generation.get("do_sample", False)
        defaults = {"temperature": 1.0, "top_k": 50}  # of transformers, where the file is silent
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: generation.get(name, defaults.get(name)) for name in names}
        if is_greedy:
            values |= {"temperature": 0.0, "top_k": 0, "top_p": None, "min_p": None}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def override(self, params: Mapping[str, Any]) -> SamplingParams:
        """These with others in their place; None keeps what is here. Raises UsageError for values out of range."""
        given = {name: value for name, value in params.items() if value is not None}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        return dataclasses.replace(self, **given)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to go on from it. `key` is the caller's, to know the answer by."""

    key: Any
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (nats), and the most probable (token, log-probability) pairs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """What became final for one request: more text, and at the end the reason.

    `finish_reason` is None while more may come, "stop" (an end-of-text token or a stop string; neither is in the text)
    or "length" (max_new_tokens, or the end of the context). The counts are totals so far. `prompt_logprobs` come with the
    last update, if they were asked for.
    """

    request: Request
    text: str
    tokens: tuple[int, ...]
    num_generated: int
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
