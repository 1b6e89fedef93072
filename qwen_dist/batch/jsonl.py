"""The input and output lines of offline inference. No jax.

Three kinds of input line are read, and each is answered in its own format:
  {"id": "a", "prompt": "Hi", "temperature": 0}             plain
  {"id": "b", "messages": [{"role": "user", …}]}            plain
  {"custom_id": "c", "method": "POST", "url": …, "body": …}  OpenAI batch API: a chat, or a text to complete
A line that cannot be used becomes an `InvalidRecord`, and the run continues with the next line.
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.errors import UserError, printable
from qwen_dist.storage.line_reader import MAX_LINE_BYTES, hash64
from qwen_dist.storage.records import Row, parse_row, read_rows, row_hash

LineFormat = Literal["plain", "openai"]

_CHAT_FIELDS = ("tools", "chat_template_kwargs")
MAX_CHOICES = 128
_CHAT_URL, _TEXT_URL = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class BatchRecord:
    """One request: exactly one of `prompt` and `messages` is given.

    Attributes:
      id: as given in the line, else "line-<number>".
      line_number: counted from 1, blank lines included.
      format: the format of the result line.
      params: the line's sampling parameters by the engine's names (`_SAMPLING_PARAMS`). Names and types have been checked;
        the engine checks the values, and the tokenizer the messages.
      tools, chat_template_kwargs: of a chat, as given; `chat.make_chat` checks them.
      model: the model that an OpenAI line names; copied to the result, otherwise ignored.
      echo: whether the result's text begins with the prompt.
      num_choices: answers to this record, all in one result line.
      line_hash: 64 bits, unique in the file also for repeated lines.
    """

    id: str | int
    line_number: int
    format: LineFormat
    params: Mapping[str, Any]
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Any = None
    chat_template_kwargs: Any = None
    model: str | None = None
    echo: bool = False
    num_choices: int = 1
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
                message = f"the id {_shortened(record.id)} is already that of an earlier line: give every line its own"
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
    try:
        fields = dict(parse_row(row))
    except UserError as error:
        return InvalidRecord(id, number, format, str(error))
    format = "openai" if "custom_id" in fields or "body" in fields else "plain"
    problems: list[str] = []
    id_name = "custom_id" if format == "openai" else "id"
    given_id = fields.pop(id_name, None)
    if _is_id(given_id):
        id = given_id
    elif given_id is not None:
        problems.append(f"{id_name} must be a non-empty string or a whole number; got {_shortened(given_id)}")
    contents = _parse_openai(fields, problems) if format == "openai" else _parse_plain(fields, problems)
    if problems:
        return InvalidRecord(id, number, format, "; ".join(problems))
    return BatchRecord(id, number, format, **contents)


def _parse_plain(fields: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    allowed = ["prompt", "messages", *_CHAT_FIELDS, *_SAMPLING_PARAMS]
    unknown = sorted(fields.keys() - set(allowed))
    if unknown:
        problems.append(f"unknown {printable(', '.join(unknown), 100)}; allowed are id, {', '.join(allowed)}")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        problems.append("give either prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        problems.append(f"prompt must be a string; got {_shortened(prompt)}")
    if messages is not None:
        _check_messages(messages, problems)
    params = _parse_params(fields, {name: name for name in _SAMPLING_PARAMS}, problems)
    return {"prompt": prompt, "messages": messages, "params": params} | {name: fields.get(name) for name in _CHAT_FIELDS}


def _parse_openai(fields: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    unknown = sorted(fields.keys() - {"method", "url", "body"})
    if unknown:
        problems.append(f"unknown {printable(', '.join(unknown), 100)}; allowed are custom_id, method, url, body")
    for name, allowed in (("method", ("POST",)), ("url", (_CHAT_URL, _TEXT_URL))):
        if fields.get(name, allowed[0]) not in allowed:
            problems.append(f"{name} must be {' or '.join(allowed)}; got {_shortened(fields[name])}")
    body, is_chat = fields.get("body"), fields.get("url") != _TEXT_URL
    if not isinstance(body, dict):
        problems.append(f'body must be an object with "{"messages" if is_chat else "prompt"}"; got {_shortened(body)}')
        return {}
    contents = _parse_chat(body, problems) if is_chat else _parse_completion(body, problems)
    model = body.get("model")
    if not isinstance(model, str | None):
        problems.append(f"model must be a string; got {_shortened(model)}")
    params = _parse_params(body, _OPENAI_SAMPLING_PARAMS, problems) | contents.pop("params")
    num_choices = 1 if body.get("n") is None else body["n"]
    if not _is_integer(num_choices) or not 1 <= num_choices <= MAX_CHOICES:
        problems.append(f"n must be a whole number from 1 to {MAX_CHOICES}; got {_shortened(num_choices)}")
    known = {*contents, "model", "n", "logprobs", "top_logprobs"} | _OPENAI_SAMPLING_PARAMS.keys() | _OPENAI_IGNORED
    refused = sorted(
        name
        for name in body.keys() - known
        if body[name] is not None
        and body[name] != _OPENAI_DEFAULTS.get(name)
        and not (name == "tool_choice" and body[name] in ("none", "auto"))
    )
    if refused:
        problems.append(f"cannot be honoured, so leave out: {printable(', '.join(refused), 100)}")
    return contents | {"params": params, "model": model, "num_choices": num_choices}


def _parse_chat(body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    _check_messages(body.get("messages"), problems)
    chat_fields = {name: body.get(name) for name in _CHAT_FIELDS}
    if body.get("tool_choice") == "none":
        chat_fields["tools"] = None  # the model calls no tool that it does not know
    return {"messages": body.get("messages"), "params": _openai_logprobs(body, problems)} | chat_fields


def _parse_completion(body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Parse a text to complete. With `echo`, the result's text and log-probabilities include the prompt."""
    prompt, echo, logprobs = body.get("prompt"), body.get("echo") or False, body.get("logprobs")
    if not isinstance(prompt, str):
        problems.append(f"prompt must be a string; got {_shortened(prompt)}")
    if not isinstance(echo, bool):
        problems.append(f"echo must be true or false; got {_shortened(echo)}")
    if logprobs is not None and not _is_count(logprobs):
        problems.append(f"logprobs must be a whole number, 0 or more; got {_shortened(logprobs)}")
    wanted = {} if logprobs is None else {"logprobs": logprobs} | ({"prompt_logprobs": logprobs} if echo else {})
    return {"prompt": prompt, "echo": echo, "params": wanted}


def _openai_logprobs(body: Mapping[str, Any], problems: list[str]) -> dict[str, int]:
    """OpenAI asks in two fields for what is one number here."""
    wanted, top = body.get("logprobs") or False, body.get("top_logprobs") or 0
    if not isinstance(wanted, bool):
        problems.append(f"logprobs must be true or false; got {_shortened(wanted)}")
    elif not _is_count(top):
        problems.append(f"top_logprobs must be a whole number, 0 or more; got {_shortened(top)}")
    elif top and not wanted:
        problems.append("top_logprobs needs logprobs: true")
    elif wanted:
        return {"logprobs": top}
    return {}


def _check_messages(messages: Any, problems: list[str]) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        problems.append(f'messages must be a non-empty list of {{"role", "content"}} objects; got {_shortened(messages)}')


def _parse_params(fields: Mapping[str, Any], names: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Return the sampling parameters among `fields`; `names` maps the line's names to the engine's."""
    params: dict[str, Any] = {}
    for name, ours in names.items():
        value = fields.get(name)
        if value is None:
            continue
        is_valid, kind = _SAMPLING_PARAMS[ours]
        if not is_valid(value):
            problems.append(f"{name} must be {kind}; got {_shortened(value)}")
        elif params.setdefault(ours, value) != value:
            problems.append(f"{name} is {_shortened(value)}, but another name for the same limit says {params[ours]}")
    if isinstance(params.get("stop"), str):
        params["stop"] = [params["stop"]]
    if "logit_bias" in params:
        params["logit_bias"] = tuple((int(token), float(bias)) for token, bias in params["logit_bias"].items())
    return params


def _is_id(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, str) and value != "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _is_stop(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return all(isinstance(stop, str) and stop for stop in stops)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        token.isascii() and token.isdigit() and str(int(token[:20])) == token and _is_number(bias)
        for token, bias in value.items()
    )


def _shortened(value: Any) -> str:
    return f"{value!r:.80}"


_Check = Callable[[Any], bool]
_NUMBER: tuple[_Check, str] = (_is_number, "a number")
_INTEGER: tuple[_Check, str] = (_is_integer, "a whole number")

# The sampling parameters of a line, by the engine's names. `logprobs` requests the log-probability of each sampled token
# and of this many of the most likely tokens.
_SAMPLING_PARAMS: dict[str, tuple[_Check, str]] = {
    "max_new_tokens": _INTEGER,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": _INTEGER,
    "stop": (_is_stop, "a non-empty string or a list of them"),
    "logprobs": (_is_count, "a whole number, 0 or more"),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "logit_bias": (_is_bias, 'an object of token ids and biases, such as {"50256": -100}'),
    "min_new_tokens": _INTEGER,
}
_OPENAI_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_OPENAI_SAMPLING_PARAMS = {
    name: name for name in _SAMPLING_PARAMS if name not in _OPENAI_NAMES.values() and name != "logprobs"
} | _OPENAI_NAMES
# Fields that do not change the result.
_OPENAI_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not supported, except with these values, which have no effect.
_OPENAI_DEFAULTS = {
    "best_of": 1,
    "response_format": {"type": "text"},
    "stream": False,
    "suffix": "",
    "tools": [],
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer to a record.

    Attributes:
      text: the generated text, without the stop string or stop token that ended it.
      finish_reason: "stop" or "length".
      num_tokens: number of generated tokens, the stop token included.
      logprobs: `{"token", "logprob", "bytes", "top_logprobs"}` for each token of the text, as in the OpenAI API; the
        log-probability of the first token of an echoed prompt is None.
    """

    text: str
    finish_reason: str
    num_tokens: int
    logprobs: Sequence[Mapping[str, Any]] | None = None


def result_line(record: BatchRecord, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
    """Return the result line of a record with its answers, in the record's format."""
    completion_tokens = sum(choice.num_tokens for choice in choices)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if record.format == "plain":
        (choice,) = choices
        line = {"id": record.id, "text": choice.text, "finish_reason": choice.finish_reason, "usage": usage}
        return line if choice.logprobs is None else line | {"logprobs": list(choice.logprobs)}
    body = {
        "id": f"{'cmpl' if record.messages is None else 'chatcmpl'}-{record.line_number}",
        "object": "text_completion" if record.messages is None else "chat.completion",
        "created": int(time.time()),
        "model": record.model or "",
        "choices": [_openai_choice(record, index, choice) for index, choice in enumerate(choices)],
        "usage": usage | {"total_tokens": prompt_tokens + completion_tokens},
    }
    return _openai_line(record, 200, body, None)


def _openai_choice(record: BatchRecord, index: int, choice: Choice) -> dict[str, Any]:
    logprobs, entry = choice.logprobs, {"index": index, "finish_reason": choice.finish_reason}
    if record.messages is None:
        return entry | {"text": choice.text, "logprobs": None if logprobs is None else _completion_logprobs(logprobs)}
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return entry | {
        "message": message,
        "logprobs": None if logprobs is None else {"content": list(logprobs), "refusal": None},
    }


def _completion_logprobs(logprobs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return log-probabilities in the column format of `/v1/completions`, with the text offset of each token."""
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(decoder.decode(bytes(entry["bytes"])))
    return {
        "tokens": [entry["token"] for entry in logprobs],
        "token_logprobs": [entry["logprob"] for entry in logprobs],
        "top_logprobs": [
            None if entry["logprob"] is None else {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
            for entry in logprobs
        ],
        "text_offset": offsets,
    }


def error_line(record: BatchRecord | InvalidRecord, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """Return the error line of a record, in the record's format; `code` is for programs, `message` for people."""
    error = {"code": code, "message": message, "line": record.line_number}
    if record.format == "plain":
        return {"id": record.id, "error": error}
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return _openai_line(record, 400, body, error)


def _openai_line(
    record: BatchRecord | InvalidRecord, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{record.line_number}",
        "custom_id": record.id,
        "response": {"status_code": status, "request_id": f"req_{record.line_number}", "body": body},
        "error": error,
    }
