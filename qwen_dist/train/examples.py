"""Records to token ids, with a mark on those that are to be learnt. No jax."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qwen_dist.errors import UserError
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.records import BadRecord, Record, Source

# Stands in for an answer to find out where in the text it is: private-use characters, which no template writes.
_PLACE = "\ue000answer\ue001"
_SHOWN_FAULTS = 20


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids, int32 [T], and which of them are to be learnt, bool [T]."""

    source: Source
    tokens: np.ndarray
    is_learnt: np.ndarray

    def __len__(self) -> int:
        """How many positions of a row it takes: the last token is only predicted."""
        return len(self.tokens) - 1


class Examples:
    """All examples of some records, in memory, and what was wrong with the others: a source for grain.

    Attributes:
      bad: the records that cannot be used.
    """

    def __init__(self, examples: Sequence[Example], bad: Sequence[BadRecord]):
        self.examples, self.bad = list(examples), list(bad)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Tokens, what each of them is followed by, and whether that is to be learnt."""
        example = self.examples[index]
        return {
            "tokens": example.tokens[:-1],
            "targets": example.tokens[1:],
            "is_learnt": example.is_learnt[1:].astype(np.int32),
        }

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.examples))

    @property
    def num_learnt(self) -> int:
        return sum(int(example.is_learnt[1:].sum()) for example in self.examples)


def make_examples(
    records: Iterable[Record | BadRecord], tokenizer: Tokenizer, *, max_length: int, bad_records: Literal["refuse", "skip"]
) -> Examples:
    """Tokenise all records; a text longer than `max_length` tokens becomes several examples.

    Raises:
      UserError: there are bad records and they are to be refused, or nothing is left.
    """
    examples: list[Example] = []
    bad: list[BadRecord] = []
    for record in records:
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        try:
            tokens, is_learnt = tokenize(record, tokenizer)
        except UserError as error:
            bad.append(BadRecord(record.source, "not renderable", str(error)))
            continue
        whole = Example(record.source, np.array(tokens, np.int32), np.array(is_learnt, bool))
        if record.form == "text":
            examples += _cut(whole, max_length)
        elif len(whole) > max_length:
            bad.append(BadRecord(record.source, "too long", f"{len(tokens)} tokens, and max_length is {max_length}"))
        else:
            examples.append(whole)
    if bad and bad_records == "refuse":
        raise UserError(f"{describe_bad(bad)}\nCorrect them, or leave them out with --config.data.bad_records=skip.")
    if not examples:
        raise UserError("training data: there is nothing to train on" + (f": {describe_bad(bad)}" if bad else "."))
    return Examples(examples, bad)


def describe_bad(bad: Sequence[BadRecord]) -> str:
    """How many records of which kind cannot be used, and where the first of them are."""
    counts = collections.Counter(record.kind for record in bad)
    lines = [f"{len(bad)} records cannot be used: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())]
    lines += [f"  - {record.source}: {record.kind}: {record.message}" for record in bad[:_SHOWN_FAULTS]]
    if len(bad) > _SHOWN_FAULTS:
        lines.append(f"  - … and {len(bad) - _SHOWN_FAULTS} more")
    return "\n".join(lines)


def tokenize(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The token ids of a record, and which are to be learnt.

    What is learnt is tokenised by itself, as what a model writes always is: training and answering see the same ids.
    Raises UserError where the chat template does not take the messages.
    """
    if record.messages:
        pieces = list(chat_pieces(record.messages, tokenizer, record.first_trained, tools=record.tools))
    else:
        pieces = [(record.prompt, False), (record.text, True)]
    tokens: list[int] = []
    is_learnt: list[bool] = []
    for text, learnt in pieces:
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens += ids
        is_learnt += [learnt] * len(ids)
    if not record.messages:
        tokens.append(tokenizer.eos_token_id)
        is_learnt.append(True)
    return tokens, is_learnt


def chat_pieces(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, first_trained: int = 0, **variables: Any
) -> Iterator[tuple[str, bool]]:
    """The text of a conversation by the model's own template, in pieces, and whether each is to be learnt.

    Learnt is what the model would have to write: from behind the opening of the assistant's turn, which the template gives
    it as the prompt, to the token that ends the turn. `first_trained` turns of the assistant before are only read.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    opening = _opening(messages, tokenizer, **variables)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    done = 0
    for index in turns[first_trained:]:
        start, end = _place(text, messages, index, tokenizer, **variables)
        opened = text.rfind(opening, done, start)
        if opened < 0:
            raise UserError(f"messages[{index}]: the chat template does not open this turn as it opens an answer")
        start, end = opened + len(opening), _turn_end(text, end, tokenizer)
        yield text[done:start], False
        yield text[start:end], True
        done = end
    # What stands behind the last answer is neither learnt nor read by anything that is.


def _opening(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **variables: Any) -> str:
    """What the template ends with to have the assistant answer, such as `<|im_start|>assistant\\n`."""
    closed = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    opened = tokenizer.render_chat(messages, add_generation_prompt=True, **variables)
    if not opened.startswith(closed) or opened == closed:
        raise UserError("the chat template has no opening for an answer, so that what to learn cannot be told")
    return opened.removeprefix(closed)


def _place(
    text: str, messages: Sequence[Mapping[str, Any]], index: int, tokenizer: Tokenizer, **variables: Any
) -> tuple[int, int]:
    """From where to where the content of a message stands in the text: that is where another content changes it."""
    changed = [*messages[:index], {**messages[index], "content": _PLACE}, *messages[index + 1 :]]
    other = tokenizer.render_chat(changed, add_generation_prompt=False, **variables)
    if _PLACE not in other:
        raise UserError(f"messages[{index}]: the chat template leaves this turn out")
    start = _common_prefix(text, other)
    behind = _common_prefix(text[start:][::-1], other[start:][::-1])
    return start, len(text) - behind


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _turn_end(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Behind the first token that ends an answer, from `start` on; the end of the text where there is none."""
    ends = [(found, found + len(stop)) for stop in tokenizer.stop_texts if (found := text.find(stop, start)) >= 0]
    return min(ends)[1] if ends else len(text)


def _cut(example: Example, max_length: int) -> Iterator[Example]:
    """Parts that take at most `max_length` positions; each begins with the last token that the one before predicted."""
    for start in range(0, len(example), max_length):
        part = slice(start, start + max_length + 1)
        yield Example(example.source, example.tokens[part], example.is_learnt[part])
