"""Read files of training data: chats, prompts with completions, plain texts. Needs neither JAX nor a tokenizer.

A file is JSON lines (.jsonl), a table (.parquet, the same fields as columns) or one plain text (.txt). Data that cannot be
used becomes a `BadTrainRecord` with its file and line; nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.errors import UsageError, UserError

RecordFormat = Literal["messages", "prompt", "text"]
ROLES = ("system", "user", "assistant", "tool")


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
      messages: a conversation; the loss counts the assistant's turns, but not the first `first_target_turn` of them.
      tools: the tools that the chat template lists.
      prompt: not counted in the loss.
      text: counted in the loss.
    """

    location: RecordLocation
    format: RecordFormat
    messages: Sequence[Mapping[str, Any]] = ()
    first_target_turn: int = 0
    tools: Sequence[Any] | None = None
    prompt: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class BadTrainRecord:
    """A record that cannot be used. `reason` is one of a few, for counting; `detail` describes this record."""

    location: RecordLocation
    reason: str
    detail: str


def find_data_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that match the patterns, sorted within each pattern.

    Raises:
      UsageError: listing every pattern without a file and every file that is missing or of an unknown type.
    """
    found = [sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] for pattern in patterns]
    problems = [f"no file matches {pattern}" for pattern, files in zip(patterns, found, strict=True) if not files]
    files = [file for matches in found for file in matches]
    problems += [f"there is no file {file}" for file in files if not pathlib.Path(file).is_file()]
    suffixes = (".jsonl", ".json", ".parquet", ".txt")
    problems += [f"{file}: a data file ends in {', '.join(suffixes)}" for file in files if not file.endswith(suffixes)]
    if problems:
        raise UsageError("training data: " + "; ".join(problems))
    return files


def read_train_records(files: Sequence[str], *, raw: bool) -> Iterator[TrainRecord | BadTrainRecord]:
    """Yield every record of the files in order. With `raw` a prompt is plain text instead of a user's turn."""
    for file in files:
        expected: RecordFormat | None = None
        for location, fields in _fields(file):
            record = fields if isinstance(fields, BadTrainRecord) else _record(location, fields, raw)
            if isinstance(record, TrainRecord):
                expected = expected or record.format
                if record.format != expected:
                    detail = f'this record has "{record.format}", the records before it have "{expected}"'
                    record = BadTrainRecord(location, "mixed file", detail)
            yield record


def _fields(file: str) -> Iterator[tuple[RecordLocation, Mapping[str, Any] | BadTrainRecord]]:
    if file.endswith(".parquet"):
        yield from _rows(file)
    elif file.endswith(".txt"):
        yield RecordLocation(file, 1), {"text": _text(file)}
    else:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    location = RecordLocation(file, number)
                    yield location, _parse(location, line)


def _text(file: str) -> str:
    try:
        return pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None


def _parse(location: RecordLocation, line: bytes) -> Mapping[str, Any] | BadTrainRecord:
    try:
        fields = json.loads(line)
    except ValueError as error:  # includes UnicodeDecodeError
        return BadTrainRecord(location, "broken line", f"not JSON: {error}")
    return (
        fields
        if isinstance(fields, dict)
        else BadTrainRecord(location, "broken line", f"not a JSON object: {fields!r:.60}")
    )


def _rows(file: str) -> Iterator[tuple[RecordLocation, Mapping[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs an extra: pip install 'qwen-dist[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise UserError(f"{file} cannot be read as parquet: {error}") from None
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield RecordLocation(file, number), {name: value for name, value in row.items() if value is not None}


def _record(location: RecordLocation, fields: Mapping[str, Any], raw: bool) -> TrainRecord | BadTrainRecord:
    if "messages" in fields:
        return _chat(location, fields["messages"], 0, fields.get("tools"))
    if "prompt" in fields and "completion" in fields:
        return _prompt(location, fields["prompt"], fields["completion"], fields.get("tools"), raw)
    if "text" in fields:
        text = fields["text"]
        if isinstance(text, str) and text.strip():
            return TrainRecord(location, "text", text=text)
        return BadTrainRecord(location, "empty text", f'"text" must be a non-empty string; it is {text!r:.60}')
    names = ", ".join(map(repr, fields)) or "nothing"
    return BadTrainRecord(
        location, "unknown format", f'a record has "messages", "prompt" and "completion", or "text"; this has {names}'
    )


def _prompt(location: RecordLocation, prompt: Any, completion: Any, tools: Any, raw: bool) -> TrainRecord | BadTrainRecord:
    if isinstance(prompt, list) and isinstance(completion, list):
        turns_before = sum(isinstance(m, dict) and m.get("role") == "assistant" for m in prompt)
        chat = _chat(location, prompt + completion, turns_before, tools)
        return chat if isinstance(chat, BadTrainRecord) else dataclasses.replace(chat, format="prompt")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return BadTrainRecord(
            location, "unknown format", '"prompt" and "completion" must both be strings, or both be messages'
        )
    if not completion:
        return BadTrainRecord(location, "empty text", '"completion" is empty')
    if raw:
        return TrainRecord(location, "prompt", prompt=prompt, text=completion)
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return TrainRecord(location, "prompt", messages=messages)


def _chat(location: RecordLocation, messages: Any, first_target_turn: int, tools: Any) -> TrainRecord | BadTrainRecord:
    if not isinstance(messages, list) or not messages:
        return BadTrainRecord(
            location, "empty conversation", f'"messages" must be a non-empty list; it is {messages!r:.60}'
        )
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if wrong := [role for role in roles if role not in ROLES]:
        return BadTrainRecord(location, "unknown role", f"the role is {wrong[0]!r}; it must be one of {', '.join(ROLES)}")
    if roles.count("assistant") <= first_target_turn:
        return BadTrainRecord(location, "no assistant turn", "no turn is the assistant's, so there is nothing to train on")
    return TrainRecord(location, "messages", messages=messages, first_target_turn=first_target_turn, tools=tools)
