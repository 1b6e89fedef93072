"""The records of offline inference: lines of requests in, lines of answers out. No jax.

Three kinds of line are read, and each is answered in its own form:
  {"id": "a", "prompt": "Hi", "temperature": 0}             plain
  {"id": "b", "messages": [{"role": "user", …}]}            plain
  {"custom_id": "c", "method": "POST", "url": …, "body": …}  a line of the OpenAI batch API: a chat, or a text to go on from
A line that cannot be used becomes a `BadRecord`, and the run goes on with the next.
"""

import codecs
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.batch.formats import read_lines
from qwen_dist.errors import UserError

Form = Literal["plain", "openai"]

_CHAT_URL, _TEXT_URL = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Record:
    """One request: exactly one of `prompt` and `messages` is given.

    Attributes:
      id: as the line gives it, else "line-<number>".
      line_number: counted from 1, blank lines included.
      form: the form in which the line is answered.
      params: the sampling parameters of this line under our names (`_PARAMS`). Names and types have been checked here;
        what values make sense is for the engine to say, and what makes a conversation for the tokenizer.
      model: the model that an OpenAI line names; echoed, not obeyed.
      echo: whether the answer begins with the prompt.
      fingerprint: a number of this line; another line, or a later one that repeats it, has another.
    """

    id: str | int
    line_number: int
    form: Form
    params: Mapping[str, Any]
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    model: str | None = None
    echo: bool = False
    fingerprint: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A line that cannot be used, and every fault in it; `id` is "line-<number>" where the line gives none."""

    id: str | int
    line_number: int
    form: Form
    message: str
    fingerprint: int = dataclasses.field(default=0, compare=False)


def digest(data: bytes) -> int:
    """64 bits that stand for these bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_records(path: str | os.PathLike[str]) -> Iterator[Record | BadRecord]:
    """The records of a file, one at a time: UTF-8 with or without BOM, blank lines skipped; see `formats` for the kinds.

    Raises:
      UserError: the file cannot be opened, or later on, it is damaged.
    """
    return _records(read_lines(path))


def _records(lines: Iterator[bytes]) -> Iterator[Record | BadRecord]:
    form: Form = "plain"
    ids, fingerprints = set[int](), set[int]()  # 64 bits each: a million lines are not held in memory
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.rstrip()
        if not line:
            continue
        record = _parse_line(line, number, form)
        id, fingerprint = digest(repr(record.id).encode()), digest(line)
        if id in ids and isinstance(record, Record):
            message = f"the id {record.id!r} is already that of an earlier line: give every line its own"
            record = BadRecord(record.id, number, record.form, message)
        if fingerprint in fingerprints:
            fingerprint = digest(line + str(number).encode())
        ids.add(id)
        fingerprints.add(fingerprint)
        form = record.form  # A line too broken to show its form is answered in that of the line before.
        yield dataclasses.replace(record, fingerprint=fingerprint)


def _parse_line(line: bytes, number: int, form: Form) -> Record | BadRecord:
    id: str | int = f"line-{number}"
    try:
        fields = _parse_object(line)
    except UserError as error:
        return BadRecord(id, number, form, str(error))
    form = "openai" if "custom_id" in fields or "body" in fields else "plain"
    faults: list[str] = []
    id_name = "custom_id" if form == "openai" else "id"
    given_id = fields.pop(id_name, None)
    if _is_id(given_id):
        id = given_id
    elif given_id is not None:
        faults.append(f"{id_name} must be a non-empty string or a whole number; got {_show(given_id)}")
    contents = _openai_contents(fields, faults) if form == "openai" else _plain_contents(fields, faults)
    if faults:
        return BadRecord(id, number, form, "; ".join(faults))
    return Record(id, number, form, **contents)


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        # `"\ud83d"` is JSON, but half a surrogate pair is no character and cannot be tokenized.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 (byte {error.start + 1})") from error
    except UnicodeEncodeError as error:
        raise UserError("the line has half of a surrogate pair, which is not a character") from error
    except json.JSONDecodeError as error:
        raise UserError(f"the line is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'the line must be a JSON object such as {{"id", "prompt"}}; got {_show(value)}')
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _plain_contents(fields: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    allowed = ["prompt", "messages", *_PARAMS]
    unknown = sorted(fields.keys() - set(allowed))
    if unknown:
        faults.append(f"unknown {', '.join(unknown)}; allowed are id, {', '.join(allowed)}")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        faults.append("give either prompt or messages")
    if prompt is not None and not isinstance(prompt, str):
        faults.append(f"prompt must be a string; got {_show(prompt)}")
    if messages is not None:
        _check_messages(messages, faults)
    params = _checked_params(fields, {name: name for name in _PARAMS}, faults)
    return {"prompt": prompt, "messages": messages, "params": params}


def _openai_contents(fields: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    unknown = sorted(fields.keys() - {"method", "url", "body"})
    if unknown:
        faults.append(f"unknown {', '.join(unknown)}; allowed are custom_id, method, url, body")
    for name, allowed in (("method", ("POST",)), ("url", (_CHAT_URL, _TEXT_URL))):
        if fields.get(name, allowed[0]) not in allowed:
            faults.append(f"{name} must be {' or '.join(allowed)}; got {_show(fields[name])}")
    body, is_chat = fields.get("body"), fields.get("url") != _TEXT_URL
    if not isinstance(body, dict):
        faults.append(f'body must be an object with "{"messages" if is_chat else "prompt"}"; got {_show(body)}')
        return {}
    contents = _chat_contents(body, faults) if is_chat else _text_contents(body, faults)
    model = body.get("model")
    if not isinstance(model, str | None):
        faults.append(f"model must be a string; got {_show(model)}")
    params = _checked_params(body, _OPENAI_NAMES, faults) | contents.pop("params")
    known = {*contents, "model", "logprobs", "top_logprobs"} | _OPENAI_NAMES.keys() | _OPENAI_HARMLESS
    refused = sorted(
        name for name in body.keys() - known if body[name] is not None and body[name] != _OPENAI_NEUTRAL.get(name)
    )
    if refused:
        faults.append(f"cannot be honoured, so leave out: {', '.join(refused)}")
    return contents | {"params": params, "model": model}


def _chat_contents(body: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    _check_messages(body.get("messages"), faults)
    return {"messages": body.get("messages"), "params": _openai_logprobs(body, faults)}


def _text_contents(body: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """A text to go on from. With `echo` the answer begins with it, and `logprobs` are also those of its tokens."""
    prompt, echo, logprobs = body.get("prompt"), body.get("echo") or False, body.get("logprobs")
    if not isinstance(prompt, str):
        faults.append(f"prompt must be a string; got {_show(prompt)}")
    if not isinstance(echo, bool):
        faults.append(f"echo must be true or false; got {_show(echo)}")
    if logprobs is not None and not _is_count(logprobs):
        faults.append(f"logprobs must be a whole number, 0 or more; got {_show(logprobs)}")
    wanted = {} if logprobs is None else {"logprobs": logprobs} | ({"prompt_logprobs": logprobs} if echo else {})
    return {"prompt": prompt, "echo": echo, "params": wanted}


def _openai_logprobs(body: Mapping[str, Any], faults: list[str]) -> dict[str, int]:
    """OpenAI asks in two fields for what is one number here."""
    wanted, top = body.get("logprobs") or False, body.get("top_logprobs") or 0
    if not isinstance(wanted, bool):
        faults.append(f"logprobs must be true or false; got {_show(wanted)}")
    elif not _is_count(top):
        faults.append(f"top_logprobs must be a whole number, 0 or more; got {_show(top)}")
    elif top and not wanted:
        faults.append("top_logprobs needs logprobs: true")
    elif wanted:
        return {"logprobs": top}
    return {}


def _check_messages(messages: Any, faults: list[str]) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        faults.append(f'messages must be a non-empty list of {{"role", "content"}} objects; got {_show(messages)}')


def _checked_params(fields: Mapping[str, Any], names: Mapping[str, str], faults: list[str]) -> dict[str, Any]:
    """The parameters among `fields`; `names` maps what the line calls them to what they are called here."""
    params: dict[str, Any] = {}
    for name, ours in names.items():
        value = fields.get(name)
        if value is None:
            continue
        is_valid, kind = _PARAMS[ours]
        if not is_valid(value):
            faults.append(f"{name} must be {kind}; got {_show(value)}")
        elif params.setdefault(ours, value) != value:
            faults.append(f"{name} is {_show(value)}, but another name for the same limit says {params[ours]}")
    if isinstance(params.get("stop"), str):
        params["stop"] = [params["stop"]]
    return params


def _is_id(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, str) and value != "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_stop(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return all(isinstance(stop, str) and stop for stop in stops)


def _show(value: Any) -> str:
    return f"{value!r:.80}"


_Check = Callable[[Any], bool]
_NUMBER: tuple[_Check, str] = (_is_number, "a number")
_WHOLE: tuple[_Check, str] = (_is_whole, "a whole number")

# What a line may ask for, by the names of the engine. `logprobs` asks for the log-probability of each chosen token and
# of that many of the likeliest beside it.
_PARAMS: dict[str, tuple[_Check, str]] = {
    "max_new_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": _WHOLE,
    "stop": (_is_stop, "a non-empty string or a list of them"),
    "logprobs": (_is_count, "a whole number, 0 or more"),
}
_OPENAI_NAMES = {name: name for name in _PARAMS if name not in ("max_new_tokens", "logprobs")} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
# These do not change an answer.
_OPENAI_HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# These would, unless they have the value that asks for nothing.
_OPENAI_NEUTRAL = {
    "best_of": 1,
    "frequency_penalty": 0,
    "logit_bias": {},
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "stream": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
}


def result_line(
    record: Record,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    logprobs: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The answer to a record, in the form of its line.

    Args:
      record: the request.
      text: the answer, without the stop string or stop token that ended it.
      finish_reason: "stop" or "length".
      prompt_tokens: how many tokens the model read.
      completion_tokens: how many it wrote, the stop token included.
      logprobs: for each token of the text `{"token", "logprob", "bytes", "top_logprobs"}`, as OpenAI lists them; the first
        of a text that begins with the prompt has None.
    """
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if record.form == "plain":
        line = {"id": record.id, "text": text, "finish_reason": finish_reason, "usage": usage}
        return line if logprobs is None else line | {"logprobs": list(logprobs)}
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
    if record.messages is None:
        choice |= {"text": text, "logprobs": None if logprobs is None else _text_logprobs(logprobs)}
    else:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = None if logprobs is None else {"content": list(logprobs), "refusal": None}
    body = {
        "id": f"{'cmpl' if record.messages is None else 'chatcmpl'}-{record.line_number}",
        "object": "text_completion" if record.messages is None else "chat.completion",
        "created": int(time.time()),
        "model": record.model or "",
        "choices": [choice],
        "usage": usage | {"total_tokens": prompt_tokens + completion_tokens},
    }
    return _openai_line(record, 200, body, None)


def _text_logprobs(logprobs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Log-probabilities as `/v1/completions` lists them: a column each, and where in the text each token begins."""
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


def error_line(record: Record | BadRecord, message: str, code: str = "invalid_request") -> dict[str, Any]:
    """What stands in place of an answer, in the form of the line: `code` is for programs, `message` for people."""
    error = {"code": code, "message": message, "line": record.line_number}
    if record.form == "plain":
        return {"id": record.id, "error": error}
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return _openai_line(record, 400, body, error)


def _openai_line(
    record: Record | BadRecord, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{record.line_number}",
        "custom_id": record.id,
        "response": {"status_code": status, "request_id": f"req_{record.line_number}", "body": body},
        "error": error,
    }
