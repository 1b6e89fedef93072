"""A chat as the chat template takes it: one form for offline inference, generation and training.

Chats come as OpenAI, vLLM, TRL and Arrow write them: tools and arguments as JSON text, nulls for what is not given, text in
parts. Whatever cannot be brought into one form is refused, and nothing is left out silently.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qwen_dist.errors import UserError, printable
from qwen_dist.json_reader import JsonError, parse_json

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "developer")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight")
# Keys that mean nothing where they are empty, as OpenAI's answers have them. Null is "not given" for every key.
_EMPTY_KEYS = ("refusal", "annotations", "audio", "function_call", "tool_calls")
# Variables of a chat template that are not the caller's to set.
_RESERVED_VARIABLES = frozenset(
    "messages tools add_generation_prompt continue_final_message chat_template tokenize raise_exception strftime_now "
    "bos_token eos_token pad_token unk_token".split()
)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation in the form that chat templates take.

    Attributes:
      messages: with the keys of `MESSAGE_KEYS` except `weight`. Content is a string; it is missing only where the message
        has `tool_calls`, whose arguments are objects.
      tools: objects; None for none.
      variables: other variables of the template, such as `enable_thinking`.
      trained: for each message whether training learns it; inference ignores it.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained: tuple[bool, ...] = ()

    def with_messages(self, messages: Sequence[dict[str, Any]]) -> Chat:
        return dataclasses.replace(self, messages=tuple(messages))


def make_chat(
    messages: Any, tools: Any = None, variables: Any = None, default_variables: Mapping[str, Any] = MappingProxyType({})
) -> Chat:
    """Return a conversation in the form of `Chat`.

    Args:
      messages: a list of `{"role", "content"}` objects. The content is a string or a list of `{"type": "text", "text"}`
        parts, which are joined.
      tools: a list of objects, or a JSON text of one.
      variables: `chat_template_kwargs`, an object.
      default_variables: those of the run, for names that `variables` does not have.

    Raises:
      UserError: listing every problem.
    """
    problems: list[str] = []
    parsed: list[dict[str, Any]] = []
    if _is_list(messages) and messages:
        parsed = [_parse_message(message, f"messages[{i}]", problems) for i, message in enumerate(messages)]
    else:
        problems.append(f'messages must be a non-empty list of {{"role", "content"}} objects; got {_show(messages)}')
    chat_tools = _parse_tools(tools, problems)
    problems += variable_problems(variables)
    if problems:
        raise UserError("; ".join(problems))
    trained = tuple(message.pop("weight", 1) != 0 and message["role"] == "assistant" for message in parsed)
    return Chat(tuple(parsed), chat_tools, {**default_variables, **(variables or {})}, trained)


def alternatives(chat: Chat) -> Iterator[Chat]:
    """Yield the chat and then the forms of the same chat that some chat templates need instead.

    Many templates do not know the role `developer`, which is OpenAI's later name of `system`. That of DeepSeek-R1 tests
    the content of a tool call with `is none`, and writes the arguments as a text.
    """
    yield chat
    forms = [chat]
    for change in (_developer_as_system, _null_contents, _arguments_as_text):
        changed = [other for form in forms if (other := change(form)) != form]
        yield from changed
        forms += changed


def _developer_as_system(chat: Chat) -> Chat:
    return chat.with_messages([m | {"role": "system"} if m["role"] == "developer" else m for m in chat.messages])


def _null_contents(chat: Chat) -> Chat:
    return chat.with_messages([{**m, "content": m.get("content")} for m in chat.messages])


def _arguments_as_text(chat: Chat) -> Chat:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return chat.with_messages(
        [m | {"tool_calls": [as_text(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in chat.messages]
    )


def _parse_message(message: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        problems.append(f'{where}: must be an object with "role" and "content"; got {_show(message)}')
        return {}
    parsed = {key: value for key, value in _given(message).items() if not _is_empty(key, value)}
    if unknown := [key for key in parsed if key not in MESSAGE_KEYS]:
        names = ", ".join(printable(repr(key), 60) for key in unknown[:10])
        problems.append(f"{where}: cannot be honoured, so leave out: {names}; known are {', '.join(MESSAGE_KEYS)}")
    role = parsed.get("role")
    if role not in ROLES:
        problems.append(f'{where}: "role" must be one of {", ".join(ROLES)}; got {_show(role)}')
    if "tool_calls" in parsed:
        parsed["tool_calls"] = _parse_tool_calls(parsed["tool_calls"], where, problems)
        if role != "assistant":
            problems.append(f'{where}: only an assistant message can have "tool_calls"')
    if "content" in parsed:
        parsed["content"] = _parse_content(parsed["content"], where, problems)
    elif "tool_calls" not in parsed:
        problems.append(f'{where}: "content" is missing')
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(parsed.get(key, ""), str):
            problems.append(f'{where}: "{key}" must be a string; got {_show(parsed[key])}')
    if "reasoning_content" in parsed and role != "assistant":
        problems.append(f'{where}: only an assistant message can have "reasoning_content"')
    if "weight" in parsed:
        _check_weight(parsed["weight"], role, where, problems)
    return parsed


def _is_empty(key: Any, value: Any) -> bool:
    return key in _EMPTY_KEYS and value in ("", [], {})


def _check_weight(weight: Any, role: Any, where: str, problems: list[str]) -> None:
    if isinstance(weight, bool) or weight not in (0, 1):
        problems.append(f'{where}: "weight" must be 0 (not trained) or 1; got {_show(weight)}')
    elif role != "assistant":
        problems.append(f'{where}: only an assistant message can have a "weight"')


def _parse_content(content: Any, where: str, problems: list[str]) -> str:
    if isinstance(content, str):
        return content
    if not _is_list(content):
        problems.append(f'{where}: "content" must be a string or a list of text parts; got {_show(content)}')
        return ""
    parts = [_given(part) if isinstance(part, Mapping) else part for part in content]
    problems += [
        f'{where}: content[{j}] must be {{"type": "text", "text": "…"}} (this model reads text only); got {_show(part)}'
        for j, part in enumerate(parts)
        if not _is_text_part(part)
    ]
    return "".join(part["text"] for part in parts if _is_text_part(part))


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _parse_tool_calls(calls: Any, where: str, problems: list[str]) -> list[dict[str, Any]]:
    calls = _parse_json_text(calls)
    if not _is_list(calls):
        problems.append(f'{where}: "tool_calls" must be a list of objects; got {_show(calls)}')
        return []
    return [_parse_tool_call(call, f"{where}.tool_calls[{j}]", problems) for j, call in enumerate(calls)]


def _parse_tool_call(call: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Return `{"type", "function": {"name", "arguments"}}`; the fields of the function may also be those of the call."""
    call = _given(call) if isinstance(call, Mapping) else call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        problems.append(f'{where} must be {{"type": "function", "function": {{"name", "arguments"}}}}; got {_show(call)}')
        return {}
    function = _given(function)
    arguments = _parse_json_text(function.get("arguments"))
    if not isinstance(arguments, Mapping | None):
        problems.append(f"{where}: the arguments must be an object, or a JSON text of one; got {_show(arguments)}")
    function["arguments"] = arguments or {}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _parse_tools(tools: Any, problems: list[str]) -> tuple[dict[str, Any], ...] | None:
    tools = _parse_json_text(tools)
    if tools is None or (_is_list(tools) and not tools):
        return None
    if not _is_list(tools):
        problems.append(f"tools must be a list of objects, or a JSON text of one; got {_show(tools)}")
        return None
    parsed = tuple(_parse_json_text(tool) for tool in tools)
    problems += [
        f'tools[{i}] must be an object such as {{"type": "function", …}}; got {_show(tool)}'
        for i, tool in enumerate(parsed)
        if not isinstance(tool, Mapping) or not tool
    ]
    return parsed


def variable_problems(variables: Any) -> list[str]:
    """Return what is wrong with `chat_template_kwargs`, an object or None."""
    if variables is None:
        return []
    if not isinstance(variables, Mapping):
        return [f"chat_template_kwargs must be an object; got {_show(variables)}"]
    reserved = sorted(_RESERVED_VARIABLES.intersection(variables))
    return [f"chat_template_kwargs cannot set {', '.join(reserved)}"] if reserved else []


def _parse_json_text(value: Any) -> Any:
    """Return what a JSON text holds, or the error of a text that is not JSON; other values as they are; None if empty."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value.encode("utf-8", "surrogatepass"))
    except JsonError as error:
        return error


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not null."""
    return {key: value for key, value in fields.items() if value is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _show(value: Any) -> str:
    return f"a text that is not JSON: {value}" if isinstance(value, JsonError) else printable(repr(value), 80)
