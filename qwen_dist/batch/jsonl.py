"""The input and output lines of offline inference. No jax.

Three kinds of input line are read, and each is answered in its own format:
  {"id": "a", "prompt": "Hi", "temperature": 0}             plain
  {"id": "b", "messages": [{"role": "user", …}]}            plain
  {"custom_id": "c", "method": "POST", "url": …, "body": …}  OpenAI batch API: a chat, or a text to complete
A line that cannot be used becomes an `InvalidRecord`, and the run continues with the next line.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.errors import UserError, printable
from qwen_dist.openai_api import (
    CHAT_FIELDS,
    CHAT_URL,
    SAMPLING_PARAMS,
    STRUCTURED_FIELDS,
    TEXT_URL,
    ApiRequest,
    Choice,
    check_messages,
    completion_body,
    error_body,
    is_integer,
    parse_body,
    parse_params,
    parse_structured_outputs,
    shortened,
    token_usage,
)
from qwen_dist.storage.line_reader import MAX_LINE_BYTES, hash64
from qwen_dist.storage.records import Row, parse_row, read_rows, row_hash

LineFormat = Literal["plain", "openai"]


@dataclasses.dataclass(frozen=True)
class BatchRecord:
    """One request.

    Attributes:
      id: as given in the line, else "line-<number>".
      line_number: counted from 1, blank lines included.
      format: the format of the result line.
      request: what is asked for.
      line_hash: 64 bits, unique in the file also for repeated lines.
    """

    id: str | int
    line_number: int
    format: LineFormat
    request: ApiRequest
    line_hash: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True)
class InvalidRecord:
    """A line that cannot be used; `message` lists every problem, and `id` is "line-<number>" where the line gives none."""

    id: str | int
    line_number: int
    format: LineFormat
    message: str
    line_hash: int = dataclasses.field(default=0, compare=False)


def read_records(
    files: str | os.PathLike[str] | Sequence[str], max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[BatchRecord | InvalidRecord]:
    """Read the records of one or more files, one at a time. Lines are numbered as if all files were one.

    Raises:
      UserError: at once if the first file cannot be opened, while reading if another cannot or one is damaged.
    """
    names = [os.fspath(files)] if isinstance(files, str | os.PathLike) else files
    first = read_rows(names[0], max_line_bytes)
    return _records(itertools.chain([first], (read_rows(name, max_line_bytes) for name in names[1:])))


def count_records(files: Sequence[str], max_line_bytes: int) -> int:
    """Return the number of records in files. Raises UserError as `read_records`."""
    return sum(1 for name in files for _ in read_rows(name, max_line_bytes))


def _records(files: Iterable[Iterator[tuple[int, Row]]]) -> Iterator[BatchRecord | InvalidRecord]:
    format: LineFormat = "plain"
    ids, line_hashes = set[int](), set[int]()  # hashes instead of lines, to save memory
    before = number = 0
    for rows in files:
        for number_in_file, row in rows:
            number = before + number_in_file
            record, line_hash = _parse_record(row, number, format), row_hash(row)
            id = hash64(repr(record.id).encode())
            if id in ids and isinstance(record, BatchRecord):
                message = f"the id {shortened(record.id)} is already that of an earlier line: give every line its own"
                record = InvalidRecord(record.id, number, record.format, message)
            if line_hash in line_hashes:
                line_hash = hash64(line_hash.to_bytes(8, "little") + str(number).encode())
            ids.add(id)
            line_hashes.add(line_hash)
            format = record.format  # the format of an unreadable line is taken from the line before
            yield dataclasses.replace(record, line_hash=line_hash)
        before = number


def _parse_record(row: Row, number: int, format: LineFormat) -> BatchRecord | InvalidRecord:
    id: str | int = f"line-{number}"
    problems: list[str] = []
    try:
        fields = dict(parse_row(row))
        format = "openai" if "custom_id" in fields or "body" in fields else "plain"
        id_name = "custom_id" if format == "openai" else "id"
        given_id = fields.pop(id_name, None)
        if is_integer(given_id) or (isinstance(given_id, str) and given_id):
            id = given_id
        elif given_id is not None:
            problems.append(f"{id_name} must be a non-empty string or a whole number; got {shortened(given_id)}")
        request = _parse_openai(fields, problems) if format == "openai" else _parse_plain(fields, problems)
    except UserError as error:
        problems.append(str(error))
    return InvalidRecord(id, number, format, "; ".join(problems)) if problems else BatchRecord(id, number, format, request)


def _parse_plain(fields: Mapping[str, Any], problems: list[str]) -> ApiRequest:
    allowed = ["prompt", "messages", *CHAT_FIELDS, *SAMPLING_PARAMS, *STRUCTURED_FIELDS]
    unknown = sorted(fields.keys() - set(allowed))
    if unknown:
        shown = [name for name in allowed if not name.startswith("guided_")]  # older names of structured_outputs
        problems.append(f"unknown {printable(', '.join(unknown), 100)}; allowed are id, {', '.join(shown)}")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        problems.append("give either prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"prompt must be a string; got {shortened(prompt)}")
    if messages is not None:
        check_messages(messages, problems)
    params = parse_params(fields, {name: name for name in SAMPLING_PARAMS}, problems)
    params |= parse_structured_outputs(fields, problems)
    return ApiRequest(params, prompt, messages, fields.get("tools"), fields.get("chat_template_kwargs"))


def _parse_openai(fields: Mapping[str, Any], problems: list[str]) -> ApiRequest:
    unknown = sorted(fields.keys() - {"method", "url", "body"})
    if unknown:
        problems.append(f"unknown {printable(', '.join(unknown), 100)}; allowed are custom_id, method, url, body")
    for name, allowed in (("method", ("POST",)), ("url", (CHAT_URL, TEXT_URL))):
        if fields.get(name, allowed[0]) not in allowed:
            problems.append(f"{name} must be {' or '.join(allowed)}; got {shortened(fields[name])}")
    return parse_body(fields.get("body"), is_chat=fields.get("url") != TEXT_URL)


def result_line(record: BatchRecord, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
    """Return the result line of a record with its answers, in the record's format."""
    if record.format == "openai":
        return _openai_line(record, 200, completion_body(record.request, choices, prompt_tokens, record.line_number), None)
    (choice,), usage = choices, token_usage(choices, prompt_tokens)
    line = {"id": record.id, "text": choice.text, "finish_reason": choice.finish_reason, "usage": usage}
    return line if choice.logprobs is None else line | {"logprobs": list(choice.logprobs)}


def error_line(record: BatchRecord | InvalidRecord, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """Return the error line of a record, in the record's format; `code` is for programs, `message` for people."""
    error = {"code": code, "message": message, "line": record.line_number}
    if record.format == "plain":
        return {"id": record.id, "error": error}
    return _openai_line(record, 400, error_body(message, code), error)


def _openai_line(
    record: BatchRecord | InvalidRecord, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{record.line_number}",
        "custom_id": record.id,
        "response": {"status_code": status, "request_id": f"req_{record.line_number}", "body": body},
        "error": error,
    }
