"""Answers that must call a tool: whatever the model samples, the arguments of the call have the schema of the tool."""

import functools
import json
import pathlib
import random
import re
import sys

import pytest

from qwen_dist import DEMO_MODEL
from qwen_dist.engine.structured_output import Grammars
from qwen_dist.errors import UserError
from qwen_dist.server.answer_parser import CALL, parse_answer, tool_parameters
from qwen_dist.server.tool_grammar import forced_call
from qwen_dist.tokenizer import Tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "engine"))
from test_structured_output import has_schema, random_answer, random_schema


@functools.cache
def demo() -> tuple[Tokenizer, Grammars]:
    tokenizer = Tokenizer.open(str(DEMO_MODEL))
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size)


def tool(name: str, schema=None) -> dict:
    return {"type": "function", "function": {"name": name} | ({} if schema is None else {"parameters": schema})}


def calls_of(tools: list[dict], seed: int, *, name=None, **more) -> list[tuple[str, dict]]:
    """Return the calls of an answer that is drawn from all that the grammar allows."""
    tokenizer, grammars = demo()
    forced = forced_call(tools, name, **({"is_xml": False, "is_thinking": False, "one_call": True} | more))
    rest = random_answer(grammars, tokenizer, {"grammar": forced.grammar}, random.Random(seed))
    parts = parse_answer(forced.beginning + rest, tool_parameters(tools), is_thinking=more.get("is_thinking", False))
    assert {part.kind for part in parts} == {"tool_call"}, forced.beginning + rest
    return [(part.name, json.loads(part.text)) for part in parts]


def of_parameters(schemas: dict, **more) -> dict:
    return {"type": "object", "properties": schemas, "required": list(schemas), "additionalProperties": False} | more


@pytest.mark.parametrize("is_xml", [False, True])
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_random_schemas_are_kept(is_xml, count):
    for seed in range(count):
        draw = random.Random(seed)
        schema = random_schema(draw)
        tools = [tool("other"), tool('näme "q"', schema)]
        ((name, arguments),) = calls_of(tools, seed, name='näme "q"', is_xml=is_xml, is_thinking=seed % 2 == 0)
        assert name == 'näme "q"' and has_schema(arguments, schema), (seed, schema, arguments)


def is_text(pattern: str):
    return lambda value: isinstance(value, str) and re.search(pattern, value, re.DOTALL) is not None


@pytest.mark.parametrize("is_xml", [False, True])
@pytest.mark.parametrize(
    ("schema", "is_valid"),
    [
        ({"type": "string", "maxLength": 30}, is_text("^.{0,30}$")),
        ({"type": "string", "pattern": "^a[/b]{2,5}$"}, is_text("^a[/b]{2,5}$")),
        ({"type": "string", "enum": ["3", "null", "a\nb", "<b>"]}, lambda value: value in ("3", "null", "a\nb", "<b>")),
        ({"enum": [1, "1.5", None, True]}, lambda value: value in (1, "1.5", None) and not isinstance(value, float)),
        ({"const": 7}, lambda value: value == 7 and isinstance(value, int)),
        ({"type": ["integer", "null"]}, lambda value: value is None or type(value) is int),
        ({"type": ["string", "null"], "minLength": 1, "maxLength": 9}, lambda value: value is None or 0 < len(value) < 10),
        ({"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]}, lambda value: value is None or len(value) < 6),
        ({"$ref": "#/$defs/Side"}, lambda value: value in ("left", "right")),
        ({"allOf": [{"type": "integer"}, {"minimum": 5, "maximum": 7}]}, lambda value: value in (5, 6, 7)),
    ],
)
def test_a_parameter_has_its_schema_in_both_forms(is_xml, schema, is_valid):
    whole = of_parameters({"value": schema}, **{"$defs": {"Side": {"enum": ["left", "right"]}}})
    for seed in range(4):
        ((_, arguments),) = calls_of([tool("a", whole)], seed, name="a", is_xml=is_xml)
        assert arguments.keys() == {"value"} and is_valid(arguments["value"]), arguments


@pytest.mark.parametrize("is_xml", [False, True])
def test_what_says_nothing_of_the_value_is_passed_over(is_xml):
    size = {"type": "object", "title": "Size", "additionalProperties": False, "properties": {"n": {"type": "boolean"}}}
    parameters = {
        "size": {"$ref": "#/$defs/Size", "description": "a"},
        "day": {"type": "string", "format": "date", "maxLength": 12},
    }
    parameters |= {"unit": {"type": "string", "enum": ["kg", "lb"], "default": "kg", "title": "Unit"}}
    schema = {"type": "object", "strict": True, "properties": parameters, "required": ["unit"], "$defs": {"Size": size}}
    schema |= {"additionalProperties": False}
    seen = set()
    for seed in range(20):
        ((_, arguments),) = calls_of([tool("weigh", schema)], seed, is_xml=is_xml)
        assert arguments["unit"] in ("kg", "lb") and arguments.keys() <= {"size", "day", "unit"}
        assert arguments.get("size", {}).keys() <= {"n"}
        seen |= arguments.keys()
    assert seen == {"size", "day", "unit"}


@pytest.mark.parametrize("is_xml", [False, True])
def test_any_tool_and_several_calls(is_xml):
    tools = [tool("now"), tool("ask", of_parameters({"n": {"type": "integer", "minimum": 0, "maximum": 9}}))]
    several = [calls_of(tools, seed, is_xml=is_xml, one_call=False) for seed in range(12)]
    assert any(len(calls) > 1 for calls in several)
    for calls in [*several, *(calls_of(tools, seed, is_xml=is_xml) for seed in range(12))]:
        assert all(arguments == {} if name == "now" else arguments["n"] in range(10) for name, arguments in calls)
    assert {name for calls in several for name, _ in calls} == {"now", "ask"}
    assert all(len(calls_of(tools, seed, is_xml=is_xml)) == 1 for seed in range(6))


def test_a_text_of_the_xml_form_ends_where_it_says():
    """What a model would write is allowed, and a text cannot have a tag that would end it."""
    tokenizer, grammars = demo()
    schema = of_parameters({"code": {"type": "string"}, "lines": {"type": "integer"}})
    forced = forced_call([tool("run", schema)], "run", is_xml=True, is_thinking=False, one_call=True)
    assert forced.beginning == "<tool_call>\n<function=run>\n"
    from qwen_dist.engine.request import SamplingParams

    def is_allowed(text: str) -> bool:
        constraint = grammars.constraint(SamplingParams(structured_outputs={"grammar": forced.grammar}))
        for token in tokenizer.encode(text, add_special_tokens=False):
            (words,) = grammars.allowed([constraint])
            if not words[token // 32] >> (token % 32) & 1:
                return False
            constraint.accept([token])
        return True

    begin, end = "<parameter=code>\n", "\n</parameter>\n<parameter=lines>\n2\n</parameter>\n</function>\n</tool_call>"
    assert is_allowed(f'{begin}if a < 3:\n    print("</b>")\n{end}')
    assert not is_allowed(f"{begin}a</parameter>") and not is_allowed(f"{begin}a</tool_call>")
    assert not is_allowed(f"{begin}a{end.replace('2', 'two')}") and not is_allowed("<parameter=lines>")


@pytest.mark.parametrize(
    ("schema", "is_xml", "message"),
    [
        ([1], False, "the parameters of 'f' cannot be used: they must be a JSON schema; got"),
        (
            {"type": "array"},
            False,
            "the parameters of 'f' cannot be used: they must be of the type \"object\"; got 'array'",
        ),
        ({"properties": 3}, True, '"properties" must be an object, and "required" a list of names'),
        ({"required": [3]}, False, '"properties" must be an object, and "required" a list of names'),
        ({"minProperties": 2}, True, "minProperties cannot be held where parameters are written one by one"),
        (of_parameters({"a>b": {}}), True, "the parameter 'a>b' of 'f' has a name that this model's form of calls cannot"),
        (of_parameters({"a": {"type": "string", "not": {}}}), True, "a: not cannot be held in a text"),
        (of_parameters({"a": {"enum": [f"x{CALL[:1]}/parameter>"]}}), True, "a lists a text that ends a call"),
    ],
)
def test_what_cannot_be_held_is_refused(schema, is_xml, message):
    with pytest.raises(UserError) as error:
        forced_call([tool("f", schema)], None, is_xml=is_xml, is_thinking=False, one_call=True)
    assert str(error.value).startswith("tool_choice: ") and message in str(error.value)
