"""The grammar of an answer that must call a tool, in Lark's syntax as llguidance reads it. No jax.

The arguments have the schema of the tool: as one JSON text, or in the XML form each parameter by itself, in the order of
the schema. There a text is written as it is, and any other value as JSON; `answer_parser` reads them by the same rule.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_dist.engine.structured_output import JSON_WHITE_SPACE
from qwen_dist.errors import UserError, printable
from qwen_dist.openai_api import END_THINK, shortened
from qwen_dist.server.answer_parser import CALL, END_CALL, is_text, tool_schemas

# What a text in the XML form must not have, because it would end there.
_TAGS = ("<parameter=", "</parameter>", END_CALL)
_LINE_BREAK = r'"\n"'
_HAS_TAG = "/(?s:.*)(?:{})(?s:.*)/".format("|".join(tag.replace("/", r"\/") for tag in _TAGS))
# The keys of a schema of all parameters that do not hold where these are written one by one.
_NOT_OF_ALL = {"not", "if", "allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "const", "enum"}
_NOT_OF_ALL |= {"minProperties", "maxProperties", "patternProperties", "propertyNames"}
_NOT_OF_ALL |= {"dependencies", "dependentRequired", "dependentSchemas"}
# The keys of a schema of a text that do not hold where it is written as it is.
_NOT_OF_TEXT = {"not", "if", "allOf", "anyOf", "oneOf", "$ref"}


@dataclasses.dataclass(frozen=True)
class ForcedCall:
    """How an answer begins that must call a tool, and the grammar of what the model writes after that."""

    beginning: str
    grammar: str


def forced_call(tools: Sequence[Any], name: str | None, *, is_xml: bool, is_thinking: bool, one_call: bool) -> ForcedCall:
    """Return the beginning and the grammar of an answer that calls tools.

    Args:
      tools: of the chat, of OpenAI's form.
      name: of the tool that is called, once; None calls any, also several, one after the other.
      is_xml: the form of the call, see `answer_parser`.
      is_thinking: the prompt ends with `<think>`; the answer has no reasoning then.
      one_call: of any tool, only one call.

    Raises:
      UserError: the schema of a tool cannot be held.
    """
    schemas = {tool: schema for tool, schema in tool_schemas(tools).items() if name in (None, tool)}
    new_form = _XmlForm if is_xml else _JsonForm
    forms = [new_form(tool, schema, f"c{number}") for number, (tool, schema) in enumerate(schemas.items())]
    beginning = f"\n{END_THINK}\n\n{CALL}\n" if is_thinking else f"{CALL}\n"
    rules = [rule for form in forms for rule in form.rules()]
    if name is not None:
        return ForcedCall(beginning + forms[0].head, "\n".join([f"start: {forms[0].name}", *rules]))
    calls = " | ".join(f"{_literal(form.head)} {form.name}" for form in forms)
    next_call = _literal(f"\n{CALL}\n")
    more = "" if one_call else f" ({next_call} call)*"
    return ForcedCall(beginning, "\n".join([f"start: call{more}", f"call: {calls}", *rules]))


class _JsonForm:
    """`{"name": …, "arguments": …}`: the head has the name, the rule `name` all after it."""

    def __init__(self, tool: str, schema: Any, name: str):
        self._schema, self.name = _object_schema(tool, schema), name
        self.head = f'{{"name": {json.dumps(tool, ensure_ascii=False)}, "arguments":'

    def rules(self) -> Iterator[str]:
        end = _literal(f"}}\n{END_CALL}")
        yield f'{self.name}: " " {self.name}a {end}'
        yield f"{self.name}a: {_json(self._schema)}"


class _XmlForm:
    """`<function=…>` with its parameters: the head has the name, the rule `name` all after it."""

    def __init__(self, tool: str, schema: Any, name: str):
        self._schema, self._tool, self.name = _object_schema(tool, schema), tool, name
        self.head = f"<function={_tag_name(tool, f'the tool {tool!r}')}>\n"
        if unknown := sorted(self._schema.keys() & _NOT_OF_ALL):
            raise _refused(tool, f"{', '.join(unknown)} cannot be held where parameters are written one by one")

    def rules(self) -> Iterator[str]:
        properties, required = self._schema.get("properties", {}), self._schema.get("required", [])
        definitions = {key: self._schema[key] for key in ("$defs", "definitions") if key in self._schema}
        named = {**properties, **{name: {} for name in required if name not in properties}}
        parts = []
        for number, (name, schema) in enumerate(named.items()):
            rule = f"{self.name}p{number}"
            begin = f"<parameter={_tag_name(name, f'the parameter {name!r} of {self._tool!r}')}>\n"
            parts.append(rule if name in required else f"{rule}?")
            yield f"{rule}: {_literal(begin)} {rule}v {_LINE_BREAK}"
            yield from self._value(f"{rule}v", name, schema, definitions)
        yield " ".join([f"{self.name}:", *parts, _literal(f"</function>\n{END_CALL}")])

    def _value(self, rule: str, name: str, schema: Any, definitions: Mapping[str, Any]) -> Iterator[str]:
        """Yield the rules of a value and of the tag that ends it."""
        end = _literal("\n</parameter>")
        options = _options(schema)
        if options is not None:
            texts = [option if isinstance(option, str) else json.dumps(option, ensure_ascii=False) for option in options]
            if any(tag in text for tag in _TAGS for text in texts):
                raise _refused(self._tool, f"{name} lists a text that ends a call")
            yield f"{rule}: ({' | '.join(map(_literal, texts))}) {end}"
        elif not is_text(schema):
            yield f"{rule}: {rule}j {end}"
            yield f"{rule}j: {_json({**schema, **definitions})}"
        else:
            if isinstance(schema, Mapping) and (unknown := sorted(schema.keys() & _NOT_OF_TEXT)):
                raise _refused(self._tool, f"{name}: {', '.join(unknown)} cannot be held in a text")
            yield f"{rule}[suffix={end}]: {rule.upper()}"
            yield f"{rule.upper()}: {_text_regex(schema if isinstance(schema, Mapping) else {})} & ~{_HAS_TAG}"


def _object_schema(tool: str, schema: Any) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments, which are an object; without one there are none."""
    if schema is None:
        return {"type": "object", "additionalProperties": False}
    if not isinstance(schema, Mapping):
        raise _refused(tool, f"they must be a JSON schema; got {shortened(schema)}")
    if "type" not in schema and "$ref" not in schema:
        schema = {"type": "object", **schema}
    if schema.get("type", "object") != "object":
        raise _refused(tool, f'they must be of the type "object"; got {shortened(schema["type"])}')
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if (
        not isinstance(properties, Mapping)
        or not isinstance(required, list)
        or not all(isinstance(n, str) for n in required)
    ):
        raise _refused(tool, '"properties" must be an object, and "required" a list of names')
    return schema


def _refused(tool: str, reason: str) -> UserError:
    return UserError(f"tool_choice: the parameters of {printable(repr(tool), 80)} cannot be used: {reason}")


def _tag_name(name: str, what: str) -> str:
    if not name or name != name.strip() or set(name) & {">", "\n"}:
        raise UserError(f"tool_choice: {printable(what, 100)} has a name that this model's form of calls cannot write")
    return name


def _options(schema: Any) -> list[Any] | None:
    """Return the values that a schema lists, of which the value must be one; None without such a list."""
    if not isinstance(schema, Mapping):
        return None
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    return options if isinstance(options, list) and options else None


def _text_regex(schema: Mapping[str, Any]) -> str:
    """Return the terminal of the texts of a schema."""
    low, high, pattern = schema.get("minLength", 0), schema.get("maxLength", ""), schema.get("pattern")
    terminal = f"/(?s:.{{{low},{high}}})/"
    if not isinstance(pattern, str):
        return terminal
    # A pattern of JSON schema may be anywhere in the text.
    begin, end = ("" if pattern.startswith("^") else "(?s:.*)"), ("" if pattern.endswith("$") else "(?s:.*)")
    inner = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/")
    return f"{terminal} & /{begin}(?:{inner}){end}/"


def _json(schema: Any) -> str:
    if isinstance(schema, Mapping):
        own = schema.get("x-guidance")
        settings = {"whitespace_pattern": JSON_WHITE_SPACE} | (dict(own) if isinstance(own, Mapping) else {})
        schema = {**schema, "x-guidance": settings}
    return f"%json {json.dumps(schema)}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
