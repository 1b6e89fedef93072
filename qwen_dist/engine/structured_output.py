"""Structured output: which tokens may come next, so that an answer gets the form that its request asks for. No jax.

llguidance parses the answer so far with a schema, a regular expression or a grammar, and says for each token of the
vocabulary whether the text with it can still be completed.

Letters: B rows, W words of 32 tokens each.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_dist.engine.request import SamplingParams, StructuredOutputs
from qwen_dist.errors import UserError, printable
from qwen_dist.storage.files import require_package
from qwen_dist.tokenizer import Tokenizer

PACKAGE = "llguidance"
# Between the parts of JSON: small models write white space without end where they may.
JSON_WHITE_SPACE = r" |\r?\n[ \t]{0,40}"
# Grammars that are kept, because many requests have the same one.
_MAX_KEPT = 128


class FormError(UserError):
    """The form that an answer must have cannot be used."""


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


class Constraint:
    """The form of one answer, and where in it the answer is.

    Args:
      matcher: of llguidance, at the beginning.
      stop_ids: the tokens that may end the answer, once it is complete.
      after: the token behind which the form begins; None: at once.
    """

    def __init__(self, matcher: Any, stop_ids: frozenset[int], after: int | None):
        self.matcher, self.stop_ids, self._after = matcher, stop_ids, after

    @property
    def has_begun(self) -> bool:
        return self._after is None

    @property
    def has_failed(self) -> bool:
        """Whether the parser has given up, because the grammar is too complex for its limits."""
        return self.matcher.is_error()

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the answer."""
        for token in tokens:
            if self._after is None:
                self.matcher.consume_token(token)
            elif token == self._after:
                self._after = None


class Grammars:
    """Compiles the forms that requests ask for. Other threads may call `check` at any time.

    Args:
      tokenizer: of the checkpoint.
      vocab_size: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = functools.lru_cache(_MAX_KEPT)(self._compile)

    def check(self, params: SamplingParams) -> None:
        """Raise UserError if an answer cannot be given the form that `params` ask for."""
        if (wanted := _wanted(params)) is not None:
            self._compiled(*wanted.form)
            self._token_after(wanted)

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """Return the constraint of a new answer, None if there is none. Raises UserError as `check`."""
        if (wanted := _wanted(params)) is None:
            return None
        matcher = self._compiled(*wanted.form).deep_copy()
        return Constraint(matcher, self._tokenizer.stop_ids.union(params.stop_token_ids), self._token_after(wanted))

    def prepare(self) -> None:
        """Read the vocabulary, which takes a second, so that no request waits for that."""
        self._compiled(*StructuredOutputs(json_object=True).form)

    def allowed(self, constraints: Sequence[Constraint | None]) -> np.ndarray:
        """Return which tokens each row may sample, uint32 [B, W], a bit for each token; a row of None may sample any."""
        bits_BW = np.full((len(constraints), -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        rows = [(row, constraint) for row, constraint in enumerate(constraints) if constraint is not None]
        if begun := [(constraint.matcher, row) for row, constraint in rows if constraint.has_begun]:
            self._executor.unsafe_compute_mask_ptr(begun, bits_BW.ctypes.data, bits_BW.strides[0], len(bits_BW))
        end = self._tokenizer.eos_token_id
        for row, constraint in rows:
            may_end = constraint.has_begun and bool(bits_BW[row, end // 32] >> (end % 32) & 1)
            for stop in constraint.stop_ids | {end}:
                word, bit = stop // 32, np.uint32(1 << stop % 32)
                is_allowed = may_end and stop in constraint.stop_ids
                bits_BW[row, word] = bits_BW[row, word] | bit if is_allowed else bits_BW[row, word] & ~bit
        return bits_BW

    def _token_after(self, wanted: StructuredOutputs) -> int | None:
        if not wanted.after:
            return None
        ids = self._tokenizer.encode(wanted.after, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"structured output cannot begin after {printable(wanted.after, 60)}, which is no single token")
        return ids[0]

    @functools.cached_property
    def _executor(self) -> Any:
        return _llguidance().LLExecutor()

    @functools.cached_property
    def _vocabulary(self) -> Any:
        return _llguidance().LLTokenizer(_Vocabulary(self._tokenizer, self._vocab_size))

    def _compile(self, kind: str, text: str) -> Any:
        """Return a matcher at the beginning of a form, to be copied."""
        library = _llguidance()
        try:
            if kind == "json":
                grammar = library.LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": JSON_WHITE_SPACE}
                )
            else:
                grammar = library.grammar_from(kind, text)
            limits = library.LLParserLimits(verbose_errors=False)
            matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise FormError(f"the {_NAMES[kind]} for structured output cannot be used: {printable(problem)}")
        return matcher


_NAMES = {"json": "JSON schema", "choice": "choice", "regex": "regular expression", "grammar": "grammar"}


def _wanted(params: SamplingParams) -> StructuredOutputs | None:
    assert not isinstance(params.structured_outputs, Mapping)
    return params.structured_outputs


def _llguidance() -> Any:
    return require_package(PACKAGE, "qwen-dist[structured]", "structured output")


class _Vocabulary:
    """The vocabulary as llguidance asks for it. What ends an answer, and other special tokens, are no text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
        special = {id for id in range(vocab_size) if tokenizer.is_special(id)}
        self.special_token_ids = sorted(special | tokenizer.stop_ids | {tokenizer.eos_token_id})
        self._of_bytes = {token: id for id, token in enumerate(self.tokens) if len(token) == 1 and id not in special}

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text that must come next.

        They are those of the tokenizer unless these have other bytes: it normalises texts and finds special tokens in them.
        """
        ids, wanted = self._tokenizer.encode(text, add_special_tokens=False), text.encode()
        is_exact = not set(ids) & set(self.special_token_ids) and b"".join(self.tokens[id] for id in ids) == wanted
        return ids if is_exact else [self._of_bytes[wanted[n : n + 1]] for n in range(len(wanted))]
