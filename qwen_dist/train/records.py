"""Files of training data to records: chats, prompts with completions, plain texts. No jax, no tokenizer.

A file is JSON lines (.jsonl), a table (.parquet, the same fields in columns) or one plain text (.txt). What cannot be used
is a `BadRecord` that names its file and line; nothing is left out silently.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.errors import UsageError, UserError

Form = Literal["messages", "prompt", "text"]
ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a record stands; lines and rows count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One thing to learn.

    messages: a conversation, of which the assistant's turns from number `first_trained` on are learnt. Or text: learnt from
    its beginning, or behind a `prompt`.
    """

    source: Source
    form: Form
    messages: Sequence[Mapping[str, Any]] = ()
    first_trained: int = 0
    tools: Sequence[Any] | None = None
    prompt: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: `kind` is what is wrong in general, `message` in particular."""

    source: Source
    kind: str
    message: str


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that the patterns name, in alphabetical order for each. Raises UsageError listing what is not there."""
    found = [sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] for pattern in patterns]
    problems = [f"no file is named {pattern}" for pattern, files in zip(patterns, found, strict=True) if not files]
    files = [file for group in found for file in group]
    problems += [f"there is no file {file}" for file in files if not pathlib.Path(file).is_file()]
    kinds = (".jsonl", ".json", ".parquet", ".txt")
    problems += [f"{file}: a data file ends in {', '.join(kinds)}" for file in files if not file.endswith(kinds)]
    if problems:
        raise UsageError("training data: " + "; ".join(problems))
    return files


def read(files: Sequence[str], *, raw: bool) -> Iterator[Record | BadRecord]:
    """Every record of the files in order; with `raw` a prompt is text and no user's turn."""
    for file in files:
        form: Form | None = None
        for source, fields in _fields(file):
            record = fields if isinstance(fields, BadRecord) else _record(source, fields, raw)
            if isinstance(record, Record):
                form = form or record.form
                if record.form != form:
                    record = BadRecord(source, "mixed file", f'this record has "{record.form}", those before it "{form}"')
            yield record


def _fields(file: str) -> Iterator[tuple[Source, Mapping[str, Any] | BadRecord]]:
    if file.endswith(".parquet"):
        yield from _rows(file)
    elif file.endswith(".txt"):
        yield Source(file, 1), {"text": _text(file)}
    else:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    source = Source(file, number)
                    yield source, _parse(source, line)


def _text(file: str) -> str:
    try:
        return pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from None


def _parse(source: Source, line: bytes) -> Mapping[str, Any] | BadRecord:
    try:
        fields = json.loads(line)
    except ValueError as error:  # a UnicodeDecodeError is one, too
        return BadRecord(source, "broken line", f"not JSON: {error}")
    return fields if isinstance(fields, dict) else BadRecord(source, "broken line", f"not a JSON object: {fields!r:.60}")


def _rows(file: str) -> Iterator[tuple[Source, Mapping[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs an extra: pip install 'qwen-dist[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these types
        raise UserError(f"{file} cannot be read as parquet: {error}") from None
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield Source(file, number), {name: value for name, value in row.items() if value is not None}


def _record(source: Source, fields: Mapping[str, Any], raw: bool) -> Record | BadRecord:
    if "messages" in fields:
        return _chat(source, fields["messages"], 0, fields.get("tools"))
    if "prompt" in fields and "completion" in fields:
        return _prompt(source, fields["prompt"], fields["completion"], fields.get("tools"), raw)
    if "text" in fields:
        text = fields["text"]
        if isinstance(text, str) and text.strip():
            return Record(source, "text", text=text)
        return BadRecord(source, "empty text", f'"text" must be a string that is not empty; it is {text!r:.60}')
    names = ", ".join(map(repr, fields)) or "nothing"
    return BadRecord(
        source, "unknown form", f'a record has "messages", "prompt" and "completion", or "text"; this has {names}'
    )


def _prompt(source: Source, prompt: Any, completion: Any, tools: Any, raw: bool) -> Record | BadRecord:
    if isinstance(prompt, list) and isinstance(completion, list):
        turns_before = sum(isinstance(m, dict) and m.get("role") == "assistant" for m in prompt)
        chat = _chat(source, prompt + completion, turns_before, tools)
        return chat if isinstance(chat, BadRecord) else dataclasses.replace(chat, form="prompt")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return BadRecord(source, "unknown form", '"prompt" and "completion" must both be strings, or both be messages')
    if not completion:
        return BadRecord(source, "empty text", '"completion" is empty')
    if raw:
        return Record(source, "prompt", prompt=prompt, text=completion)
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Record(source, "prompt", messages=messages)


def _chat(source: Source, messages: Any, first_trained: int, tools: Any) -> Record | BadRecord:
    if not isinstance(messages, list) or not messages:
        return BadRecord(
            source, "empty conversation", f'"messages" must be a list that is not empty; it is {messages!r:.60}'
        )
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if wrong := [role for role in roles if role not in ROLES]:
        return BadRecord(source, "unknown role", f"the role {wrong[0]!r}; there are {', '.join(ROLES)}")
    if roles.count("assistant") <= first_trained:
        return BadRecord(source, "no assistant turn", "nothing here is the assistant's, so nothing would be learnt")
    return Record(source, "messages", messages=messages, first_trained=first_trained, tools=tools)
