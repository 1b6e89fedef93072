"""Divide the text of a chat's answer into reasoning, content and tool calls. No jax.

Qwen models write their reasoning as `<think>…</think>`, and a call of a tool as `<tool_call>…</tool_call>` around one of
  {"name": "get_weather", "arguments": {"city": "Oslo"}}                          Hermes: Qwen2.5, Qwen3
  <function=get_weather><parameter=city>Oslo</parameter></function>               XML: Qwen3-Coder, Qwen3.5
A text that cannot be read as a call stays content, so nothing is lost.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qwen_dist.openai_api import END_THINK, THINK

CALL, END_CALL = "<tool_call>", "</tool_call>"
# The schema of each parameter of each tool, by their names.
ToolParameters = Mapping[str, Mapping[str, Any]]

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class AnswerPart:
    """A part of an answer: text to append to the reasoning or the content, or a whole call.

    Attributes:
      kind: what it is.
      text: of a call, its arguments: the JSON text of an object.
      name: of the tool that is called.
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""


class AnswerParser:
    """Takes the text of one answer in pieces. The parts do not depend on where the pieces end.

    Args:
      tools: the tools of the chat; None does not look for calls.
      is_thinking: the prompt ends with `<think>`, so that the answer begins with reasoning.
      is_forced: the answer must call a tool, and so ends in a call only if it is cut; that call is left out.
    """

    def __init__(self, tools: ToolParameters | None, *, is_thinking: bool = False, is_forced: bool = False):
        self._tools, self._is_forced = tools, is_forced
        self._mode: Literal["start", "reasoning", "space", "content", "call"] = "reasoning" if is_thinking else "start"
        self._buffer = ""
        self._has_reasoning = False
        self._before_call = ""  # white space, which belongs to the text if there is no call
        self._searched = 0

    def push(self, text: str) -> list[AnswerPart]:
        """Return the parts that have become final."""
        self._buffer += text
        parts: list[AnswerPart] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[AnswerPart]:
        """Return the rest, at the end of the answer."""
        parts: list[AnswerPart] = []
        rest, self._buffer = self._buffer, ""
        if self._mode == "reasoning":
            self._add_reasoning(rest.rstrip(), parts)
        elif self._mode == "call":
            if not self._is_forced:
                self._add_call(rest, "", parts)
        elif self._mode in ("start", "content") and rest:
            parts.append(AnswerPart("content", rest))
        return parts

    def _advance(self, parts: list[AnswerPart]) -> bool:
        """Take what is final from the buffer; return whether the mode has changed."""
        before = self._mode
        step = {
            "start": self._start,
            "reasoning": self._reason,
            "space": self._skip_space,
            "content": self._write,
            "call": self._call,
        }
        step[self._mode](parts)
        return self._mode != before

    def _start(self, parts: list[AnswerPart]) -> None:
        begin = self._buffer.lstrip()
        if begin.startswith(THINK):
            self._mode, self._buffer = "reasoning", begin.removeprefix(THINK)
        elif not THINK.startswith(begin):
            self._mode = "content"

    def _reason(self, parts: list[AnswerPart]) -> None:
        text, end, rest = self._buffer.partition(END_THINK)
        if end:
            self._mode, self._buffer = "space", rest
        else:
            text = text[: len(text) - _overlap(text, END_THINK)]
            self._buffer = self._buffer[len(text.rstrip()) :]
        self._add_reasoning(text.rstrip(), parts)

    def _add_reasoning(self, text: str, parts: list[AnswerPart]) -> None:
        text = text if self._has_reasoning else text.lstrip()
        if text:
            self._has_reasoning = True
            parts.append(AnswerPart("reasoning", text))

    def _skip_space(self, parts: list[AnswerPart]) -> None:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._mode = "content"

    def _write(self, parts: list[AnswerPart]) -> None:
        text, begin, rest = self._buffer.partition(CALL) if self._tools is not None else (self._buffer, "", "")
        if begin:
            shown = text.rstrip()
            self._mode, self._buffer, self._searched, self._before_call = "call", rest, 0, text[len(shown) :]
        elif self._tools is not None:
            shown = text[: len(text) - _overlap(text, CALL)].rstrip()
            self._buffer = self._buffer[len(shown) :]
        else:
            shown, self._buffer = text, ""
        if shown:
            parts.append(AnswerPart("content", shown))

    def _call(self, parts: list[AnswerPart]) -> None:
        end = self._buffer.find(END_CALL, self._searched)
        while end >= 0 and _is_in_string(self._buffer[:end]):
            end = self._buffer.find(END_CALL, end + 1)
        if end < 0:
            self._searched = max(0, len(self._buffer) - len(END_CALL) + 1)
            return
        body, self._buffer = self._buffer[:end], self._buffer[end + len(END_CALL) :]
        self._mode = "space" if self._add_call(body, END_CALL, parts) else "content"

    def _add_call(self, body: str, end: str, parts: list[AnswerPart]) -> bool:
        """Add a call; return False if the text is none and was added as it is."""
        call = parse_tool_call(body, self._tools or {})
        parts.append(call or AnswerPart("content", f"{self._before_call}{CALL}{body}{end}"))
        return call is not None


def parse_answer(text: str, tools: ToolParameters | None, *, is_thinking: bool = False) -> list[AnswerPart]:
    """Return the parts of a whole answer. Arguments as of `AnswerParser`."""
    parser = AnswerParser(tools, is_thinking=is_thinking)
    return parser.push(text) + parser.finish()


def parse_tool_call(body: str, tools: ToolParameters) -> AnswerPart | None:
    """Return the call between `<tool_call>` and `</tool_call>`, in either form; None if it is none."""
    body = body.strip()
    return _parse_json_call(body) if body.startswith("{") else _parse_xml_call(body, tools)


def _parse_json_call(body: str) -> AnswerPart | None:
    call = _json_or_none(body)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # some models write the object as a text
        arguments = _json_or_none(arguments)
    if arguments is not None and not isinstance(arguments, dict):
        return None
    return AnswerPart("tool_call", json.dumps(arguments or {}, ensure_ascii=False), call["name"])


def _parse_xml_call(body: str, tools: ToolParameters) -> AnswerPart | None:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    name, text = function[1].strip(), function[2]
    if not name or _PARAMETER.sub("", text).strip():
        return None
    schemas = tools.get(name, {})
    arguments = {
        parameter: _parameter_value(value, schemas.get(parameter))
        for parameter, value in ((match[1].strip(), match[2]) for match in _PARAMETER.finditer(text))
    }
    return AnswerPart("tool_call", json.dumps(arguments, ensure_ascii=False), name)


def _parameter_value(text: str, schema: Any) -> Any:
    """Return the value of a parameter: JSON where the tool's schema has another type than a string."""
    text = text.removeprefix("\n").removesuffix("\n")  # the model writes a value on lines of its own
    options = schema.get("enum", [schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    for option in options if isinstance(options, list) else []:
        if text == (option if isinstance(option, str) else json.dumps(option, ensure_ascii=False)):
            return option
    kinds = _kinds(schema)
    if is_text(schema) and not (text == "null" and "null" in kinds):
        return text
    if "boolean" in kinds and text.strip() in ("True", "False"):
        return text.strip() == "True"
    if text.strip() == "None":
        return None
    value = _json_or_none(text)
    return text if value is None and text.strip() != "null" else value


def _kinds(schema: Any) -> list[Any]:
    """Return the types that a schema allows, `[None]` if it names none."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind if isinstance(kind, list) else [kind]


def is_text(schema: Any) -> bool:
    """Return whether the XML form writes a value of this schema as it is, and not as JSON."""
    if not isinstance(schema, Mapping):
        return True
    kinds = _kinds(schema)
    return "string" in kinds or (kinds == [None] and not {"anyOf", "oneOf", "allOf", "$ref"} & schema.keys())


def tool_schemas(tools: Iterable[Any]) -> dict[str, Any]:
    """Return the schemas of the tools' arguments by their names, None without one; not of what is no tool."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    return {
        function["name"]: function.get("parameters")
        for function in functions
        if isinstance(function, Mapping) and isinstance(function.get("name"), str)
    }


def tool_parameters(tools: Iterable[Any]) -> ToolParameters:
    """Return the schemas of each parameter of the tools."""
    properties = {
        name: schema.get("properties") if isinstance(schema, Mapping) else None
        for name, schema in tool_schemas(tools).items()
    }
    return {name: found if isinstance(found, Mapping) else {} for name, found in properties.items()}


def joined(parts: Sequence[AnswerPart], kind: str) -> str:
    """Return the text of all parts of a kind."""
    return "".join(part.text for part in parts if part.kind == kind)


def _json_or_none(text: str) -> Any:
    """Parse JSON as a model may write it: of a key that occurs twice the last counts."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no NaN, and no half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return value


def _is_in_string(body: str) -> bool:
    """Return whether the end of a JSON text is inside a string. Other texts have no strings."""
    return body.lstrip().startswith("{") and '"' in _JSON_STRING.sub("", body)


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of `text` that begins the tag."""
    return next((length for length in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:length])), 0)
