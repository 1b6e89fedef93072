"""Requests to the engine, and its outputs. No jax."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from qwen_dist.errors import UsageError, printable

MAX_TOP_LOGPROBS = 20
# Of one request: every step sends them to the devices.
MAX_BIASED_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """The form that an answer must have, under the names of vLLM: exactly one of the first five.

    Attributes:
      json: the answer is JSON that has this schema, an object or its JSON text.
      json_object: the answer is a JSON object.
      regex: it matches this regular expression, in the syntax of Rust.
      choice: it is one of these texts.
      grammar: it is of this grammar, in the Lark syntax of llguidance.
      after: the text of a token behind which the form begins, such as `</think>`; empty: at the beginning of the answer.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    after: str = ""

    def __post_init__(self) -> None:
        forms: dict[str, Any] = {"json": self.json, "json_object": self.json_object or None}
        forms |= {"regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        given = [name for name, form in forms.items() if form is not None]
        if len(given) != 1:
            raise UsageError(f"structured_outputs must have one of {', '.join(forms)}; it has {', '.join(given) or 'none'}")
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice or not all(isinstance(text, str) and text for text in self.choice):
                raise UsageError("structured_outputs: choice must be a list of non-empty texts")
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", json.dumps(self.json))

    @property
    def form(self) -> tuple[str, str]:
        """Which of the forms it is, and its text; that of `choice` is a JSON list."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        name = next(name for name in ("json", "regex", "grammar") if getattr(self, name) is not None)
        return name, getattr(self, name)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled and when to stop. The defaults are greedy and change no probability.

    Attributes, in the order in which transformers and vLLM apply them:
      logit_bias: (token id, bias) pairs, added to the logits.
      sequence_bias: (token ids, bias) pairs: added to the logit of the last token where the tokens before it came last.
      no_repeat_ngram_size: prompt and answer together repeat no sequence of this many tokens; 0 allows all.
      min_new_tokens, min_length: the fewest tokens of the answer, or of prompt and answer, before a stop token is allowed.
      begin_suppress_tokens: token ids that an answer does not begin with.
      repetition_penalty: divides the logits of tokens that prompt or answer already have (multiplies negative logits).
      frequency_penalty: subtracted from a token's logit as often as the answer has it.
      presence_penalty: subtracted once from the logits of tokens that the answer has.
      temperature: divides the logits; 0 takes the most probable token and ignores the following three.
      top_k: keep the K most probable tokens; 0 and -1 keep all.
      top_p: keep the smallest set of tokens with this total probability.
      min_p: keep tokens at least this fraction as probable as the best.
      seed: fixes the draws of this request, whatever other requests are in the batch.
      stop: texts before which the answer ends. The text of a special token stands for the token.
      max_new_tokens: the most tokens of the answer.
      max_length: the most tokens of prompt and answer together, of which the answer has at least one; None for no limit.
      logprobs: return the log-probability of each sampled token under the unmodified distribution, and of this many best
        alternatives.
      prompt_logprobs: return the same for the prompt's tokens from the second on. With it `max_new_tokens` may be 0, which
        only scores the prompt.
      stop_token_ids: tokens that end the answer, besides those of the checkpoint.
      structured_outputs: the form that the answer must have, or a dictionary of its fields, such as `{"json": schema}`.
        Tokens that do not fit it are not sampled; biases and bans that leave no other token do not count.
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
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    min_length: int = 0
    max_length: int | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.structured_outputs, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputs(**self.structured_outputs))
        is_scored = self.prompt_logprobs is not None
        checks = {
            "max_new_tokens": (self.max_new_tokens >= (0 if is_scored else 1), "at least 1, or 0 to score the prompt"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= -1, "0 or -1 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "seed": (-(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "stop": (all(self.stop), "non-empty strings"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "logit_bias": (self._has_valid_bias(), f"at most {MAX_BIASED_TOKENS} token ids with a bias from -100 to 100"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "min_new_tokens": (self.min_new_tokens >= 0, "0 or more"),
            "min_length": (self.min_length >= 0, "0 or more"),
            "max_length": (self.max_length is None or self.max_length >= 1, "at least 1"),
        }
        wrong = [
            f"{name} is {printable(repr(getattr(self, name)), 80)}; it must be {rule}"
            for name, (ok, rule) in checks.items()
            if not ok
        ]
        if wrong:
            raise UsageError("; ".join(wrong))

    def _has_valid_bias(self) -> bool:
        in_range = all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias)
        return in_range and len(self.logit_bias) <= MAX_BIASED_TOKENS

    def override(self, params: Mapping[str, Any]) -> SamplingParams:
        """Return these parameters with some replaced; None replaces nothing. Raises UsageError for values out of range."""
        given = {name: value for name, value in params.items() if value is not None}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        # As in transformers, a limit on the answer replaces one on prompt and answer together.
        if "max_new_tokens" in given:
            given = {"max_length": None} | given
        if "min_new_tokens" in given:
            given = {"min_length": 0} | given
        return dataclasses.replace(self, **given)

    def with_seed_of_choice(self, index: int) -> SamplingParams:
        """Return the parameters of one of several answers to the same prompt: the first has the seed as given."""
        return dataclasses.replace(self, seed=(self.seed + index + 2**63) % 2**64 - 2**63) if index else self


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to continue it.

    Attributes:
      key: the caller's name for it.
      prompt, params: see above.
      adapter: the name of the adapter that it uses; empty for none.
      is_embedding: return the hidden state of the prompt's last token, and no answer.
    """

    key: Any
    prompt: tuple[int, ...]
    params: SamplingParams
    adapter: str = ""
    is_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (nats), and the most probable (token, log-probability) pairs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """The text and tokens of one request that became final.

    Attributes:
      text, tokens, logprobs: those since the output before.
      num_generated: all tokens so far.
      finish_reason: None while more may follow; "stop" after an end-of-text token or a stop string, neither of which is in
        the text; "length" after max_new_tokens or at the end of the context.
      prompt_logprobs: with the last output, if the request wants them.
      end_logprob: of the token that ended the answer, which `logprobs` does not have; None if there is none.
      num_cached_tokens: of the prompt, those whose states were in the prefix cache and were not computed again.
      embedding: the last layer's normalised output at the prompt's last token, if the request is for an embedding.
    """

    request: Request
    text: str
    tokens: tuple[int, ...]
    num_generated: int
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    embedding: tuple[float, ...] = ()
    end_logprob: TokenLogprob | None = None
