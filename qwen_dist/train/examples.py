"""Tokenize training records and mark the tokens that the loss counts. Needs no JAX."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from qwen_dist.chat import Chat
from qwen_dist.chat_template import TurnFormat
from qwen_dist.errors import UserError
from qwen_dist.tokenizer import Tokenizer, TooLongError
from qwen_dist.train.records import BadTrainRecord, RecordLocation, TrainRecord

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

    def ends_of_targets(self, tokenizer: Tokenizer) -> set[int]:
        """Return the special tokens that end targets: those with which the trained model ends its answers."""
        ends: set[int] = set()
        for example in self.examples:
            last = example.loss_mask & ~np.append(example.loss_mask[1:], False)
            ends.update(example.tokens[last].tolist())
        return {token for token in ends if tokenizer.is_special(token)}


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
            # A record has one token more than positions.
            tokens, loss_mask = tokenize(record, tokenizer, None if record.format == "text" else max_length + 1)
        except TooLongError as error:
            bad.append(BadTrainRecord(record.location, "too long", f"{error} (max_length is {max_length})"))
            continue
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


def tokenize(record: TrainRecord, tokenizer: Tokenizer, max_tokens: int | None = None) -> tuple[list[int], list[bool]]:
    """Return the token ids of a record, and for each whether the loss counts it.

    Targets are tokenized separately from the text before them, as generated text always is, so that training and inference
    see the same ids.

    Raises:
      UserError: the chat template refuses the messages.
      TooLongError: by its length alone, a text has more than `max_tokens` tokens.
    """
    if max_tokens is not None:
        contents = [record.prompt, record.text] if record.chat is None else [m.get("content") for m in record.chat.messages]
        for content in contents:
            tokenizer.check_length(content or "", max_tokens)
    if record.chat is not None:
        spans = list(chat_spans(record.chat, tokenizer))
    else:
        spans = [(record.prompt, False), (record.text, True)]
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for text, is_target in spans:
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens += ids
        loss_mask += [is_target] * len(ids)
    if record.chat is None:
        tokens.append(tokenizer.eos_token_id)
        loss_mask.append(True)
    return tokens, loss_mask


def chat_spans(chat: Chat, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Render a conversation with the model's chat template, as spans of text.

    Targets are what the model has to generate in the turns with `chat.trained`: from the end of the generation prompt, or
    of the part of it that the turn begins with, to the token with which the template ends an answer. The templates of
    thinking models end the generation prompt with `<think>`, and write earlier answers without it.

    Yields:
      A span of text, and whether it is a target. The spans end with the last target.

    Raises:
      UserError: the chat template refuses the messages, or the targets cannot be found.
    """
    template = tokenizer.chat_template(chat)
    turns = template.turn_format(chat.variables)
    ending = _ending(tokenizer, turns)
    text, ends = template.render_with_ends(chat)
    done = position = 0
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            position = max(position, ends[index])
            continue
        # Only text of the template is between the end of the message before and the start of the turn.
        opening = text.find(turns.opening, position)
        whole = text.startswith(turns.generation_prompt, opening)
        start = opening + len(turns.generation_prompt if whole else turns.opening)
        end = text.find(ending, max(start, ends[index]))
        if opening < 0 or end < 0:
            raise UserError(
                f"messages[{index}]: the chat template does not open and end this turn as it does other answers"
            )
        position = end + len(ending)
        if chat.trained[index]:
            yield text[done:start], False
            yield text[start:position], True
            done = position


def _ending(tokenizer: Tokenizer, turns: TurnFormat) -> str:
    """Return the text of the token with which the template ends an answer."""
    end = tokenizer.end_of_turn(turns)
    if end is None:
        raise UserError(
            "the chat template writes no special token after an answer, so a model trained with it could not end one"
        )
    return tokenizer.decode([end], skip_special_tokens=False)


def _split(example: Example, max_length: int) -> Iterator[Example]:
    """Yield examples of at most `max_length` positions; each begins with the last target of the one before."""
    for start in range(0, len(example), max_length):
        part = slice(start, start + max_length + 1)
        yield Example(example.location, example.tokens[part], example.loss_mask[part])
