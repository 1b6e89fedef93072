"""Read files of training data: chats, prompts with completions, plain texts. Needs neither JAX nor a tokenizer.

Which files are read, `storage.records` says. Chats have OpenAI's, ShareGPT's or Alpaca's fields. Data that cannot be used
becomes a `BadTrainRecord` with its file and line; nothing is dropped silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.chat import ROLES, Chat, make_chat
from qwen_dist.errors import UserError, printable
from qwen_dist.json_reader import JsonError, parse_json
from qwen_dist.storage.line_reader import MAX_LINE_BYTES
from qwen_dist.storage.records import RECORD_SUFFIXES, TEXT_SUFFIXES, find_files, parse_row, read_rows, read_text

RecordFormat = Literal["messages", "prompt", "text", "conversations", "instruction"]

# The names of ShareGPT's speakers in chats.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclasses.dataclass(frozen=True)
class RecordLocation:
    """The file and line (or row) of a record; lines and rows count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """One training record: a conversation, or a text with an optional prompt.

    Attributes:
      location: the file and line.
      format: of the record in its file.
      chat: a conversation; the loss counts its trained turns.
      prompt: not counted in the loss.
      text: counted in the loss.
    """

    location: RecordLocation
    format: RecordFormat
    chat: Chat | None = None
    prompt: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class BadTrainRecord:
    """A record that cannot be used. `reason` is one of a few, for counting; `detail` describes this record."""

    location: RecordLocation
    reason: str
    detail: str


def find_data_files(patterns: Sequence[str], flag: str = "--data") -> list[str]:
    """Return the files of the patterns. Arguments and errors as in `find_files`."""
    return find_files(patterns, (*RECORD_SUFFIXES, *TEXT_SUFFIXES), flag, only_suffixes=True)


def read_train_records(
    files: Sequence[str],
    *,
    raw: bool,
    variables: Mapping[str, Any] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[TrainRecord | BadTrainRecord]:
    """Yield every record of the files in order.

    Args:
      files: from `find_data_files`.
      raw: a prompt is plain text instead of a user's turn.
      variables: of the chat template, for chats that do not set them.
      max_line_bytes: the most bytes of a line, of a row or of a plain text.

    Raises:
      UserError: a file cannot be read or is damaged.
    """
    for file in files:
        expected: RecordFormat | None = None
        for location, fields in _fields(file, max_line_bytes):
            record = fields if isinstance(fields, BadTrainRecord) else _record(location, fields, raw, variables or {})
            if isinstance(record, TrainRecord):
                expected = expected or record.format
                if record.format != expected:
                    detail = f'this record has "{record.format}", the records before it have "{expected}"'
                    record = BadTrainRecord(location, "mixed file", detail)
            yield record


def _fields(file: str, max_bytes: int) -> Iterator[tuple[RecordLocation, Mapping[str, Any] | BadTrainRecord]]:
    if file.endswith(TEXT_SUFFIXES):
        yield RecordLocation(file, 1), {"text": read_text(file, max_bytes)}
        return
    for number, row in read_rows(file, max_bytes):
        location = RecordLocation(file, number)
        try:
            yield location, parse_row(row)
        except UserError as error:
            yield location, BadTrainRecord(location, "broken line", str(error))


def _record(
    location: RecordLocation, fields: Mapping[str, Any], raw: bool, variables: Mapping[str, Any]
) -> TrainRecord | BadTrainRecord:
    fields = {name: value for name, value in fields.items() if value is not None}
    if "messages" in fields:
        return _chat(location, "messages", fields["messages"], fields, variables)
    if "conversations" in fields:
        return _sharegpt(location, fields, variables)
    if "prompt" in fields and "completion" in fields:
        return _prompt(location, fields["prompt"], fields["completion"], fields, variables, raw)
    if "instruction" in fields and "output" in fields:
        return _alpaca(location, fields, variables, raw)
    if "text" in fields:
        text = fields["text"]
        if isinstance(text, str) and text.strip():
            return TrainRecord(location, "text", text=text)
        return BadTrainRecord(location, "empty text", f'"text" must be a non-empty string; it is {text!r:.60}')
    names = printable(", ".join(map(repr, fields)) or "nothing", 200)
    return BadTrainRecord(
        location,
        "unknown format",
        'a record has "messages", "conversations", "prompt" and "completion", "instruction" and "output", or "text"; '
        f"this has {names}",
    )


def _prompt(
    location: RecordLocation,
    prompt: Any,
    completion: Any,
    fields: Mapping[str, Any],
    variables: Mapping[str, Any],
    raw: bool,
) -> TrainRecord | BadTrainRecord:
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(location, "prompt", prompt + completion, fields, variables, first_trained=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return BadTrainRecord(
            location, "unknown format", '"prompt" and "completion" must both be strings, or both be messages'
        )
    if not completion:
        return BadTrainRecord(location, "empty text", '"completion" is empty')
    if raw:
        return TrainRecord(location, "prompt", prompt=prompt, text=completion)
    return _chat(location, "prompt", _turns((prompt, completion)), fields, variables)


def _turns(*exchanges: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]


def _alpaca(
    location: RecordLocation, fields: Mapping[str, Any], variables: Mapping[str, Any], raw: bool
) -> TrainRecord | BadTrainRecord:
    """Return Alpaca's `instruction`, `input` and `output`, after `system` and `history`, pairs of question and answer."""
    texts = [fields.get(name) or "" for name in ("instruction", "input", "output", "system")]
    history = fields.get("history") or []
    if not all(isinstance(text, str) for text in texts) or not _are_pairs(history):
        detail = '"instruction", "input", "output" and "system" must be strings, and "history" pairs of strings'
        return BadTrainRecord(location, "unknown format", detail)
    instruction, more, output, system = texts
    if not output:
        return BadTrainRecord(location, "empty text", '"output" is empty')
    question = f"{instruction}\n{more}" if instruction and more else instruction or more
    if raw and (system or history):
        return BadTrainRecord(location, "unknown format", '"system" and "history" need the chat template (data.raw is set)')
    if raw:
        return TrainRecord(location, "instruction", prompt=question, text=output)
    messages = [{"role": "system", "content": system}] if system else []
    return _chat(location, "instruction", messages + _turns(*map(tuple, history), (question, output)), fields, variables)


def _are_pairs(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )


def _sharegpt(
    location: RecordLocation, fields: Mapping[str, Any], variables: Mapping[str, Any]
) -> TrainRecord | BadTrainRecord:
    """Return ShareGPT's `conversations`: turns with `from` and `value`, or messages as in other chats."""
    turns, system = fields["conversations"], fields.get("system")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return _chat(location, "conversations", turns, fields, variables)
    messages = [{"role": "system", "content": system}] if system else []
    return _chat(location, "conversations", messages + [_sharegpt_message(turn) for turn in turns], fields, variables)


def _sharegpt_message(turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" not in turn:
        return dict(turn)
    speaker, value = turn["from"], turn.get("value")
    others = {key: other for key, other in turn.items() if key not in ("from", "value")}
    role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker != "function_call":
        return {"role": role, "content": value} | others
    calls: Any = value
    if isinstance(value, str):
        with contextlib.suppress(JsonError):
            calls = parse_json(value.encode("utf-8", "surrogatepass"))
    return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls]} | others


def _chat(
    location: RecordLocation,
    format: RecordFormat,
    messages: Any,
    fields: Mapping[str, Any],
    variables: Mapping[str, Any],
    first_trained: int = 0,
) -> TrainRecord | BadTrainRecord:
    """Return a record of a chat, in which the messages before `first_trained` are not trained."""
    if not isinstance(messages, list) or not messages:
        return BadTrainRecord(
            location, "empty conversation", f'"{format}" must be a non-empty list; it is {messages!r:.60}'
        )
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if wrong := [role for role in roles if role not in ROLES]:
        detail = f"the role is {printable(repr(wrong[0]), 60)}; it must be one of {', '.join(ROLES)}"
        return BadTrainRecord(location, "unknown role", detail)
    try:
        chat = make_chat(messages, fields.get("tools"), fields.get("chat_template_kwargs"), variables)
    except UserError as error:
        return BadTrainRecord(location, "invalid chat", str(error))
    chat = dataclasses.replace(chat, trained=(False,) * first_trained + chat.trained[first_trained:])
    if not any(chat.trained):
        detail = "no turn is the assistant's (with a weight other than 0), so there is nothing to train on"
        return BadTrainRecord(location, "no assistant turn", detail)
    return TrainRecord(location, format, chat)
