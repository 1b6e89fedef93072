"""Reasoning, content and tool calls of an answer, however the text comes in pieces."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.server.answer_parser import (
    CALL,
    END_CALL,
    AnswerParser,
    AnswerPart,
    joined,
    parse_answer,
    tool_parameters,
)
from qwen_dist.server.tool_grammar import forced_call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "at": {"type": ["string", "null"]},
                    "places": {"type": "array"},
                    "any": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                }
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARAMETERS = tool_parameters(TOOLS)
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
XML = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"


def summary(parts: list[AnswerPart]) -> tuple[str, str, list]:
    calls = [(part.name, json.loads(part.text)) for part in parts if part.kind == "tool_call"]
    return joined(parts, "reasoning"), joined(parts, "content"), calls


OSLO = ("get_weather", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain  text \n", ("", "plain  text \n", [])),
        ("", ("", "", [])),
        ("  <think>\nwell, <b>\n\n</think>\n\nYes.", ("well, <b>", "Yes.", [])),
        ("<think>\nnever ends </thi", ("never ends </thi", "", [])),
        ("a <think>b</think>", ("", "a <think>b</think>", [])),
        ("<thin", ("", "<thin", [])),
        (HERMES, ("", "", [OSLO])),
        (XML, ("", "", [OSLO])),
        (f"<think>hm</think>\n\nLet me see. \n{HERMES}\n{XML}\n", ("hm", "Let me see.", [OSLO, OSLO])),
        (f"{HERMES}\nDone. ", ("", "Done. ", [OSLO])),
        (HERMES.removesuffix("\n</tool_call>"), ("", "", [OSLO])),  # without the last tag
        ('<tool_call>{"name": "now"}</tool_call>', ("", "", [("now", {})])),
        ('<tool_call>{"name": "now", "parameters": {"a": 1}}</tool_call>', ("", "", [("now", {"a": 1})])),
        ('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [("now", {"a": 1})])),
        ('<tool_call>{"name": "now", "arguments": {"a": 1, "a": 2}}</tool_call>', ("", "", [("now", {"a": 2})])),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', ("", '<tool_call>{"name": "\\ud800"}</tool_call>', [])),
        (
            '<tool_call>{"name": "a", "arguments": {"b": NaN}}',
            ("", '<tool_call>{"name": "a", "arguments": {"b": NaN}}', []),
        ),
        ("<tool_call><function=now></function></tool_call>", ("", "", [("now", {})])),
        ('a \n<tool_call>{"name": "no</tool_call> b', ("", 'a \n<tool_call>{"name": "no</tool_call> b', [])),
        ("a\n<tool_call>{]</tool_call>\nb", ("", "a\n<tool_call>{]</tool_call>\nb", [])),
        (f"<tool_call>nothing</tool_call>{HERMES}", ("", "<tool_call>nothing</tool_call>", [OSLO])),
        ('<tool_call>{"name": 3}</tool_call>', ("", '<tool_call>{"name": 3}</tool_call>', [])),
        ('<tool_call>{"name": "a", "arguments": [1]}', ("", '<tool_call>{"name": "a", "arguments": [1]}', [])),
        ("<tool_call><function=a>x</function></tool_call>", ("", "<tool_call><function=a>x</function></tool_call>", [])),
        (
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call> \\" {"}}</tool_call>',
            ("", "", [("now", {"a": '</tool_call> " {'})]),
        ),
    ],
)
def test_answers(text, expected):
    assert summary(parse_answer(text, PARAMETERS)) == expected


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "\n New\nYork \n", " New\nYork "),
        ("city", "3", "3"),
        ("days", "\n3\n", 3),
        ("days", "many", "many"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("at", "null", None),
        ("at", "noon", "noon"),
        ("places", '["a", {"b": 1}]', ["a", {"b": 1}]),
        ("any", "7", 7),
        ("any", "None", None),
        ("unknown", "3", "3"),
    ],
)
def test_parameters_of_the_xml_form_have_the_types_of_the_schema(name, text, value):
    body = f"<function=get_weather><parameter={name}>{text}</parameter></function>"
    ((_, arguments),) = summary(parse_answer(f"{CALL}{body}{END_CALL}", PARAMETERS))[2]
    assert arguments == {name: value}
    without_ends = f"{CALL}<function=get_weather><parameter={name}>{text}<parameter=city>x</function>{END_CALL}"
    ((_, arguments),) = summary(parse_answer(without_ends, PARAMETERS))[2]
    assert arguments["city"] == "x"


def test_without_tools_calls_are_content():
    assert summary(parse_answer(f"<think>a</think> b {HERMES} ", None)) == ("a", f"b {HERMES} ", [])


def test_an_answer_may_begin_inside_the_reasoning():
    assert summary(parse_answer("\nhm\n</think>\n\nYes", None, is_thinking=True)) == ("hm", "Yes", [])
    for is_xml, whole in ((False, HERMES), (True, XML)):
        for name, is_thinking in itertools.product(("get_weather", None), (False, True)):
            begin = forced_call(TOOLS, name, is_xml=is_xml, is_thinking=is_thinking, one_call=True).beginning
            written = begin.removeprefix("\n</think>\n\n")
            assert whole.startswith(written) and (written != begin) == is_thinking
            text = begin + whole.removeprefix(written)
            assert summary(parse_answer(text, PARAMETERS, is_thinking=is_thinking)) == ("", "", [OSLO])


PIECES = st.sampled_from(
    [
        *("<think>", "</think>", CALL, END_CALL, HERMES, XML, "<", "</", "<tool", "_call>", " ", "\n", '"', "\\", "{", "}"),
        *('{"name": "now"', "<function=now>", "</function>", "<parameter=a>", "</parameter>", "x", "日", "a b"),
    ]
)


@settings(max_examples=600, deadline=None)
@given(
    text=st.lists(PIECES, max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    has_tools=st.booleans(),
    is_thinking=st.booleans(),
)
def test_any_division_into_pieces_gives_the_same_parts(text, cuts, has_tools, is_thinking):
    tools = PARAMETERS if has_tools else None
    whole = summary(parse_answer(text, tools, is_thinking=is_thinking))
    for places in (sorted({min(cut, len(text)) for cut in cuts}), range(len(text) + 1)):
        parser, parts, before = AnswerParser(tools, is_thinking=is_thinking), [], 0
        for place in [*places, len(text)]:
            parts += parser.push(text[before:place])
            before = place
        assert summary(parts + parser.finish()) == whole
    # Nothing but tags, calls and white space around them is left out.
    if not whole[2]:
        kept = (whole[0] + whole[1]).split()
        assert "".join(kept) == "".join(text.replace("<think>", "", 1).replace("</think>", "", 1).split()) or (
            "".join(kept) == "".join(text.split()) or is_thinking or "<think>" in text
        )
