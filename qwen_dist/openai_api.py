"""Bodies and answers of the OpenAI API: chats and texts to complete, for lines of a batch and for a server. No jax.

`parse_body` reads a body strictly: what cannot be honoured is an error that lists every problem. `make_requests` turns it
into requests to the engine, a `PendingAnswer` collects their outputs, and `completion_body` is the answer.

The name is not `openai`, which is that of OpenAI's client: in a script run from this directory the module would hide it.
"""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_dist.chat import make_chat
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams, StructuredOutputs, TokenLogprob
from qwen_dist.errors import UserError, printable
from qwen_dist.tokenizer import Tokenizer

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
CHAT_FIELDS = ("tools", "chat_template_kwargs")
# What a prompt ends with whose answer begins with reasoning, and what ends the reasoning.
THINK, END_THINK = "<think>", "</think>"
MAX_CHOICES = 128


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """What is asked for: exactly one of `prompt` and `messages` is given.

    Attributes:
      params: the sampling parameters by the engine's names (`SAMPLING_PARAMS`). Names and types have been checked; the
        engine checks the values, and the tokenizer the messages.
      prompt: given to the model without the chat template; a text or token ids.
      tools, chat_template_kwargs: of a chat, as given; `chat.make_chat` checks them.
      model: the model that the body names; copied to the answer, otherwise ignored.
      echo: whether the answer's text begins with the prompt.
      num_choices: how many answers are in one body.
    """

    params: Mapping[str, Any]
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Any = None
    chat_template_kwargs: Any = None
    model: str | None = None
    echo: bool = False
    num_choices: int = 1


def parse_body(body: Any, *, is_chat: bool) -> ApiRequest:
    """Return the request of a body, which is parsed JSON, for `CHAT_URL` or `TEXT_URL`.

    Raises:
      UserError: the body cannot be used; the message lists all problems.
    """
    if not isinstance(body, dict):
        content = "messages" if is_chat else "prompt"
        raise UserError(f'body must be an object with "{content}"; got {shortened(body)}')
    problems: list[str] = []
    contents = _parse_chat(body, problems) if is_chat else _parse_completion(body, problems)
    model = body.get("model")
    if not isinstance(model, str | None):
        problems.append(f"model must be a string; got {shortened(model)}")
    params = parse_params(body, _PARAMS, problems) | contents.pop("params") | parse_structured_outputs(body, problems)
    num_choices = 1 if body.get("n") is None else body["n"]
    if not is_integer(num_choices) or not 1 <= num_choices <= MAX_CHOICES:
        problems.append(f"n must be a whole number from 1 to {MAX_CHOICES}; got {shortened(num_choices)}")
    known = {*contents, *STRUCTURED_FIELDS, "model", "n", "logprobs", "top_logprobs"} | _PARAMS.keys() | _IGNORED
    refused = sorted(
        name
        for name in body.keys() - known
        if body[name] is not None
        and body[name] != _NEUTRAL.get(name)
        and not (name == "tool_choice" and body[name] in ("none", "auto"))
    )
    if refused:
        problems.append(f"cannot be honoured, so leave out: {printable(', '.join(refused), 100)}")
    if problems:
        raise UserError("; ".join(problems))
    return ApiRequest(**contents, params=params, model=model, num_choices=num_choices)


def _parse_chat(body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    check_messages(body.get("messages"), problems)
    chat_fields = {name: body.get(name) for name in CHAT_FIELDS}
    if body.get("tool_choice") == "none":
        chat_fields["tools"] = None  # the model calls no tool that it does not know
    return {"messages": body.get("messages"), "params": _chat_logprobs(body, problems)} | chat_fields


def _parse_completion(body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Parse a text to complete. With `echo`, the result's text and log-probabilities include the prompt."""
    prompt, echo, logprobs = body.get("prompt"), body.get("echo") or False, body.get("logprobs")
    if not isinstance(prompt, str) and not are_tokens(prompt):
        problems.append(f"prompt must be a string or a list of token ids; got {shortened(prompt)}")
    if not isinstance(echo, bool):
        problems.append(f"echo must be true or false; got {shortened(echo)}")
    if logprobs is not None and not _is_count(logprobs):
        problems.append(f"logprobs must be a whole number, 0 or more; got {shortened(logprobs)}")
    wanted = {} if logprobs is None else {"logprobs": logprobs} | ({"prompt_logprobs": logprobs} if echo else {})
    return {"prompt": prompt, "echo": echo, "params": wanted}


def _chat_logprobs(body: Mapping[str, Any], problems: list[str]) -> dict[str, int]:
    """OpenAI asks in two fields for what is one number here."""
    wanted, top = body.get("logprobs") or False, body.get("top_logprobs") or 0
    if not isinstance(wanted, bool):
        problems.append(f"logprobs must be true or false; got {shortened(wanted)}")
    elif not _is_count(top):
        problems.append(f"top_logprobs must be a whole number, 0 or more; got {shortened(top)}")
    elif top and not wanted:
        problems.append("top_logprobs needs logprobs: true")
    elif wanted:
        return {"logprobs": top}
    return {}


def check_messages(messages: Any, problems: list[str]) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        problems.append(f'messages must be a non-empty list of {{"role", "content"}} objects; got {shortened(messages)}')


def parse_params(fields: Mapping[str, Any], names: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Return the sampling parameters among `fields`; `names` maps the line's names to the engine's."""
    params: dict[str, Any] = {}
    for name, ours in names.items():
        value = fields.get(name)
        if value is None:
            continue
        is_valid, kind = SAMPLING_PARAMS[ours]
        if not is_valid(value):
            problems.append(f"{name} must be {kind}; got {shortened(value)}")
        elif params.setdefault(ours, value) != value:
            problems.append(f"{name} is {shortened(value)}, but another name for the same limit says {params[ours]}")
    if isinstance(params.get("stop"), str):
        params["stop"] = [params["stop"]]
    if "logit_bias" in params:
        params["logit_bias"] = tuple((int(token), float(bias)) for token, bias in params["logit_bias"].items())
    return params


def parse_structured_outputs(fields: Mapping[str, Any], problems: list[str]) -> dict[str, StructuredOutputs]:
    """Return the sampling parameter that `STRUCTURED_FIELDS` ask for, of which one may be given."""
    given = [name for name in STRUCTURED_FIELDS if fields.get(name) is not None]
    if "response_format" in given and fields["response_format"] == {"type": "text"}:
        given.remove("response_format")
    if not given:
        return {}
    name, value = given[0], fields[given[0]]
    if len(given) > 1:
        problems.append(f"{name} and {given[1]} are both given; give one of them")
    if fields.get("tools") and fields.get("tool_choice") != "none":
        problems.append(f"{name} excludes tools: leave one of them out, or give tool_choice none")
    forms = _forms(name, value)
    wanted = {form: text for form, text in forms.items() if text not in (None, False)}
    if len(wanted) != 1 or not wanted.keys() <= _FORMS.keys():
        problems.append(f"{name} must be {_FORMS_OF[name]}; got {shortened(value)}")
        return {}
    ((form, text),) = wanted.items()
    is_valid, kind = _FORMS[form]
    if not is_valid(text):
        problems.append(f"{name}: {form} must be {kind}; got {shortened(text)}")
        return {}
    return {"structured_outputs": StructuredOutputs(**wanted)}


def _forms(name: str, value: Any) -> Mapping[str, Any]:
    """Return what a field asks for, by the names of `StructuredOutputs`; other names where it is not understood."""
    if name.startswith("guided_"):
        return {name.removeprefix("guided_"): value}
    if name == "structured_outputs":
        return value if isinstance(value, dict) else {}
    if value == {"type": "json_object"}:
        return {"json_object": True}
    is_schema = isinstance(value, dict) and value.get("type") == "json_schema" and len(value) == 2
    named = value["json_schema"] if is_schema and "json_schema" in value else None
    if not isinstance(named, dict) or not named.keys() <= {"name", "description", "schema", "strict"}:
        return {}
    return {"json": named.get("schema")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def are_tokens(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_count, value))


def _is_stop(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return all(isinstance(stop, str) and stop for stop in stops)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        token.isascii() and token.isdigit() and str(int(token[:20])) == token and _is_number(bias)
        for token, bias in value.items()
    )


def shortened(value: Any) -> str:
    """Return a value for a message, cut to 80 characters."""
    return f"{value!r:.80}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_choice(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


_Check = Callable[[Any], bool]
_NUMBER: tuple[_Check, str] = (_is_number, "a number")
_INTEGER: tuple[_Check, str] = (is_integer, "a whole number")

# The sampling parameters of a line, by the engine's names. `logprobs` requests the log-probability of each sampled token
# and of this many of the most likely tokens.
SAMPLING_PARAMS: dict[str, tuple[_Check, str]] = {
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
# The forms of `StructuredOutputs`.
_FORMS: dict[str, tuple[_Check, str]] = {
    "json": (lambda value: isinstance(value, dict | str | bool), "a JSON schema, as an object or a text"),
    "json_object": (lambda value: value is True, "true"),
    "regex": (_is_text, "a regular expression"),
    "choice": (_is_choice, "a list of non-empty texts"),
    "grammar": (_is_text, "a grammar in Lark's syntax"),
}
# The fields that ask for structured output: OpenAI's, vLLM's, and those that vLLM had before.
_FORMS_OF = {
    "response_format": 'of type "text", "json_object", or "json_schema" with "json_schema": {"name": …, "schema": {…}}',
    "structured_outputs": f"an object with one of {', '.join(_FORMS)}",
} | {f"guided_{form}": _FORMS[form][1] for form in ("json", "regex", "choice", "grammar")}
STRUCTURED_FIELDS = tuple(_FORMS_OF)
_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_PARAMS = {name: name for name in SAMPLING_PARAMS if name not in _NAMES.values() and name != "logprobs"} | _NAMES
# Fields that do not change the result.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not supported, except with these values, which have no effect.
_NEUTRAL = {
    "best_of": 1,
    "stream": False,
    "suffix": "",
    "tools": [],
}


def make_requests(
    request: ApiRequest,
    tokenizer: Tokenizer,
    defaults: SamplingParams,
    key: Callable[[int], Any],
    *,
    max_context: int,
    variables: Mapping[str, Any],
) -> list[Request]:
    """Return a request to the engine for each choice; they differ in their seeds.

    Args:
      request: the whole request.
      tokenizer: of the checkpoint.
      defaults: sampling parameters, overridden by the request's own.
      key: returns the key of a choice by its index.
      max_context: the most tokens of a prompt. A text that is far longer is refused before it is tokenized; what is exact
        is `Engine.check`.
      variables: of the chat template, for a request that does not set them.

    Raises:
      UserError: the request cannot be answered.
    """
    params = defaults.override(request.params)
    if request.messages is None:
        text = request.prompt or ""
        if isinstance(text, str):
            tokenizer.check_length(text, max_context)
        prompt = tokenizer.encode(text) if isinstance(text, str) else list(text)
    else:
        chat = make_chat(request.messages, request.tools, request.chat_template_kwargs, variables)
        prompt = tokenizer.encode_prompt(chat, max_context)
        params = params.override({"stop_token_ids": tokenizer.chat_stop_ids})
        if params.structured_outputs is not None and begins_with_reasoning(prompt, tokenizer):
            assert isinstance(params.structured_outputs, StructuredOutputs)
            structured = dataclasses.replace(params.structured_outputs, after=END_THINK)
            params = params.override({"structured_outputs": structured})
    return [Request(key(index), tuple(prompt), params.with_seed_of_choice(index)) for index in range(request.num_choices)]


def begins_with_reasoning(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether the end of a prompt says that its answer begins inside the reasoning."""
    return tokenizer.decode(prompt[-len(THINK) :], skip_special_tokens=False).rstrip().endswith(THINK)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer to a record.

    Attributes:
      text: the generated text, without the stop string or stop token that ended it.
      finish_reason: "stop" or "length".
      num_tokens: number of generated tokens, the stop token included.
      logprobs: `{"token", "logprob", "bytes", "top_logprobs"}` for each token of the text, as in the OpenAI API; the
        log-probability of the first token of an echoed prompt is None.
      num_cached_tokens: of the prompt, those that were read from the prefix cache.
      end_logprob: the same of the token that ended the answer, if one did.
    """

    text: str
    finish_reason: str
    num_tokens: int
    logprobs: Sequence[Mapping[str, Any]] | None = None
    num_cached_tokens: int = 0
    end_logprob: Mapping[str, Any] | None = None


class PendingAnswer:
    """Collects what the engine returns for the choices of one request.

    Attributes:
      choices: those that are finished, by index.
      num_prompt_tokens: of the prompt, once a choice is finished.
    """

    def __init__(self, request: ApiRequest, tokenizer: Tokenizer):
        self._request, self._tokenizer = request, tokenizer
        self._texts = [""] * request.num_choices
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in self._texts]
        self.choices: dict[int, Choice] = {}
        self.num_prompt_tokens = 0

    def add(self, index: int, output: RequestOutput) -> bool:
        """Add an output of the choice `index`. Return whether all choices are finished by it."""
        self._texts[index] += output.text
        self._logprobs[index] += output.logprobs
        if output.finish_reason is None:
            return False
        self.num_prompt_tokens = len(output.request.prompt)
        text = echoed_text(self._request, self._tokenizer) + self._texts[index]
        logprobs = self._all_logprobs(index, output)
        num_generated, num_cached = output.num_generated, output.num_cached_tokens
        end = None if output.end_logprob is None else logprob_json(output.end_logprob, self._tokenizer)
        self.choices[index] = Choice(text, output.finish_reason, num_generated, logprobs, num_cached, end)
        return len(self.choices) == self._request.num_choices

    def _all_logprobs(self, index: int, output: RequestOutput) -> list[dict[str, Any]] | None:
        if output.request.params.logprobs is None:
            return None
        logprobs = [logprob_json(token, self._tokenizer) for token in self._logprobs[index]]
        if self._request.echo:
            first = logprob_json(TokenLogprob(output.request.prompt[0], 0.0, ()), self._tokenizer) | {"logprob": None}
            logprobs = [first, *(logprob_json(token, self._tokenizer) for token in output.prompt_logprobs), *logprobs]
        return logprobs

    def in_order(self) -> list[Choice]:
        """Return the finished choices by their index."""
        return [self.choices[index] for index in sorted(self.choices)]


def echoed_text(request: ApiRequest, tokenizer: Tokenizer) -> str:
    """Return the text of the prompt with which every answer begins; empty without `echo`."""
    prompt = request.prompt if request.echo and request.prompt is not None else ""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)


def logprob_json(logprob: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a token's log-probability in the format of the OpenAI API."""

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    top = [entry(token, value) for token, value in logprob.top]
    return entry(logprob.token, logprob.logprob) | {"top_logprobs": top}


def token_usage(choices: Sequence[Choice], prompt_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of prompt and answers."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": sum(choice.num_tokens for choice in choices)}


def completion_body(
    request: ApiRequest, choices: Sequence[Choice], prompt_tokens: int, number: int | str
) -> dict[str, Any]:
    """Return the body that answers a request; `number` makes its id unique."""
    is_chat, usage = request.messages is not None, token_usage(choices, prompt_tokens)
    # The prompt counts once: what the first choice computes, the others read from the cache.
    num_cached = min(choice.num_cached_tokens for choice in choices)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or "",
        "choices": [_choice_json(index, choice, is_chat=is_chat) for index, choice in enumerate(choices)],
        "usage": usage | {"total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": num_cached}},
    }


def _choice_json(index: int, choice: Choice, *, is_chat: bool) -> dict[str, Any]:
    logprobs, entry = choice.logprobs, {"index": index, "finish_reason": choice.finish_reason}
    if not is_chat:
        end = [] if choice.end_logprob is None else [choice.end_logprob]
        columns = None if logprobs is None else completion_logprobs([*logprobs, *end], TextOffsets())
        return entry | {"text": choice.text, "logprobs": columns}
    return entry | {
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": list(logprobs), "refusal": None},
    }


class TextOffsets:
    """The offset in the text at which each token begins.

    It may be ahead of the text that was streamed, which is held back while it may be the start of a stop string.
    """

    def __init__(self) -> None:
        self._decoder, self._end = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def push(self, raw: bytes) -> int:
        """Return where the next token begins, which has these bytes."""
        begin = self._end
        self._end += len(self._decoder.decode(raw))
        return begin


def completion_logprobs(logprobs: Sequence[Mapping[str, Any]], offsets: TextOffsets) -> dict[str, list[Any]]:
    """Return log-probabilities in the column format of `/v1/completions`, with the text offset of each token.

    The token that ended the text is among them, because clients such as lm-eval expect an entry for each generated token.
    """
    return {
        "tokens": [entry["token"] for entry in logprobs],
        "token_logprobs": [entry["logprob"] for entry in logprobs],
        "top_logprobs": [None if entry["logprob"] is None else _top_by_text(entry) for entry in logprobs],
        "text_offset": [offsets.push(bytes(entry["bytes"])) for entry in logprobs],
    }


def _top_by_text(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the best alternatives by their texts, and the token itself, which may be one more. Of equal texts the best."""
    found: dict[str, float] = {}
    for one in (*entry["top_logprobs"], entry):
        found.setdefault(one["token"], one["logprob"])
    return found


def error_body(message: str, code: str = "invalid_request") -> dict[str, Any]:
    """Return the body of an error of the client; `code` is for programs, `message` for people."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
