"""Tokenize training records and mark the tokens that the loss counts. Needs no JAX."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qwen_dist.errors import UserError
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.records import BadTrainRecord, RecordLocation, TrainRecord

# Replaces a message to find its place in the rendered text. Private-use characters: no template writes them.
_PLACEHOLDER = "\ue000answer\ue001"
_MAX_LISTED_RECORDS = 20


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized example.

    Attributes:
      location: of its record.
      tokens: int32 [T].
      loss_mask: bool [T], True for the tokens that the loss counts.
    """

    location: RecordLocation
    tokens: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        """Return the number of positions it takes in a row: the last token is only a target."""
        return len(self.tokens) - 1


class Examples:
    """All examples in memory, as a data source for grain.

    Attributes:
      examples: in the order of their records.
      bad: the records that cannot be used.
    """

    def __init__(self, examples: Sequence[Example], bad: Sequence[BadTrainRecord]):
        self.examples, self.bad = list(examples), list(bad)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return tokens, targets and loss mask of one example, int32 [T - 1] each."""
        example = self.examples[index]
        return {
            "tokens": example.tokens[:-1],
            "targets": example.tokens[1:],
            "loss_mask": example.loss_mask[1:].astype(np.int32),
        }

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.examples))

    @property
    def num_target_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return sum(int(example.loss_mask[1:].sum()) for example in self.examples)


def make_examples(
    records: Iterable[TrainRecord | BadTrainRecord],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    bad_records: Literal["refuse", "skip"],
) -> Examples:
    """Tokenize all records; a plain text longer than `max_length` tokens becomes several examples.

    Raises:
      UserError: `bad_records` is "refuse" and there are some, or no record can be used.
    """
    examples: list[Example] = []
    bad: list[BadTrainRecord] = []
    for record in records:
        if isinstance(record, BadTrainRecord):
            bad.append(record)
            continue
        try:
            tokens, loss_mask = tokenize(record, tokenizer)
        except UserError as error:
            bad.append(BadTrainRecord(record.location, "not renderable", str(error)))
            continue
        example = Example(record.location, np.array(tokens, np.int32), np.array(loss_mask, bool))
        if record.format == "text":
            examples += _split(example, max_length)
        elif len(example) > max_length:
            detail = f"it has {len(tokens)} tokens, and max_length is {max_length}"
            bad.append(BadTrainRecord(record.location, "too long", detail))
        else:
            examples.append(example)
    if bad and bad_records == "refuse":
        raise UserError(f"{describe_bad_records(bad)}\nCorrect them, or skip them with --config.data.bad_records=skip.")
    if not examples:
        raise UserError("training data: there is nothing to train on" + (f": {describe_bad_records(bad)}" if bad else "."))
    return Examples(examples, bad)


def describe_bad_records(bad: Sequence[BadTrainRecord]) -> str:
    """Return a text with the number of bad records by reason, and the locations of the first ones."""
    counts = collections.Counter(record.reason for record in bad)
    lines = [f"{len(bad)} records cannot be used: " + ", ".join(f"{count} {reason}" for reason, count in counts.items())]
    lines += [f"  - {record.location}: {record.reason}: {record.detail}" for record in bad[:_MAX_LISTED_RECORDS]]
    if len(bad) > _MAX_LISTED_RECORDS:
        lines.append(f"  - … and {len(bad) - _MAX_LISTED_RECORDS} more")
    return "\n".join(lines)


def tokenize(record: TrainRecord, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of a record, and for each whether the loss counts it.

    Targets are tokenized separately from the text before them, as generated text always is, so that training and inference
    see the same ids.

    Raises:
      UserError: the chat template refuses the messages.
    """
    if record.messages:
        spans = list(chat_spans(record.messages, tokenizer, record.first_target_turn, tools=record.tools))
    else:
        spans = [(record.prompt, False), (record.text, True)]
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for text, is_target in spans:
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens += ids
        loss_mask += [is_target] * len(ids)
    if not record.messages:
        tokens.append(tokenizer.eos_token_id)
        loss_mask.append(True)
    return tokens, loss_mask


def chat_spans(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, first_target_turn: int = 0, **variables: Any
) -> Iterator[tuple[str, bool]]:
    """Render a conversation with the model's chat template, as spans of text.

    Targets are what the model has to generate: from the end of the generation prompt to the token that ends the turn. The
    first `first_target_turn` turns of the assistant are not targets.

    Yields:
      A span of text, and whether it is a target. The spans end with the last target.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    prompt = _generation_prompt(messages, tokenizer, **variables)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    done = 0
    for index in turns[first_target_turn:]:
        start, end = _content_span(text, messages, index, tokenizer, **variables)
        prompt_start = text.rfind(prompt, done, start)
        if prompt_start < 0:
            raise UserError(f"messages[{index}]: the chat template does not begin this turn with its generation prompt")
        start, end = prompt_start + len(prompt), _turn_end(text, end, tokenizer)
        yield text[done:start], False
        yield text[start:end], True
        done = end


def _generation_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **variables: Any) -> str:
    """Return what the template appends to have the assistant answer, such as `<|im_start|>assistant\\n`."""
    without = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    with_prompt = tokenizer.render_chat(messages, add_generation_prompt=True, **variables)
    if not with_prompt.startswith(without) or with_prompt == without:
        raise UserError("the chat template has no generation prompt, so the targets of training cannot be found")
    return with_prompt.removeprefix(without)


def _content_span(
    text: str, messages: Sequence[Mapping[str, Any]], index: int, tokenizer: Tokenizer, **variables: Any
) -> tuple[int, int]:
    """Return start and end of a message's content in the text: the part that changes with the content."""
    changed = [*messages[:index], {**messages[index], "content": _PLACEHOLDER}, *messages[index + 1 :]]
    other = tokenizer.render_chat(changed, add_generation_prompt=False, **variables)
    if _PLACEHOLDER not in other:
        raise UserError(f"messages[{index}]: the chat template leaves this turn out")
    start = _common_prefix(text, other)
    num_after = _common_prefix(text[start:][::-1], other[start:][::-1])
    return start, len(text) - num_after


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _turn_end(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Return the end of the first stop text from `start` on, or the end of the text if there is none."""
    ends = [(found, found + len(stop)) for stop in tokenizer.stop_texts if (found := text.find(stop, start)) >= 0]
    return min(ends)[1] if ends else len(text)


def _split(example: Example, max_length: int) -> Iterator[Example]:
    """Yield examples of at most `max_length` positions; each begins with the last target of the one before."""
    for start in range(0, len(example), max_length):
        part = slice(start, start + max_length + 1)
        yield Example(example.location, example.tokens[part], example.loss_mask[part])
