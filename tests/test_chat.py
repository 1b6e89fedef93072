"""One form of chats: texts of JSON, nulls, roles, keys of messages and weights."""

import json

import pytest

from qwen_dist.chat import Chat, make_chat
from qwen_dist.config import ChatOptions, GenerateConfig, load_config
from qwen_dist.errors import UsageError, UserError

USER = {"role": "user", "content": "the fox"}
ANSWER = {"role": "assistant", "content": "brown dog"}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"a": [1, None]}}}]


def calling(arguments, **more):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | more


def test_the_form_of_a_chat():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        USER,
        ANSWER,
    ]
    assert make_chat(messages, TOOLS, {"enable_thinking": False}) == Chat(
        ({"role": "system", "content": "be brief"}, USER, ANSWER),
        tuple(TOOLS),
        {"enable_thinking": False},
        (False, False, True),
    )


def test_nulls_and_empty_fields_of_answers_are_not_given():
    message = ANSWER | {"tool_calls": None, "name": None, "refusal": None, "annotations": [], "function_call": None}
    assert make_chat([USER, message, USER | {"weight": None, "tool_calls": []}]).messages == (USER, ANSWER, USER)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS], tuple(TOOLS)])
def test_tools_may_be_texts(tools):
    assert make_chat([USER], tools).tools == tuple(TOOLS)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools):
    assert make_chat([USER], tools).tools is None


@pytest.mark.parametrize("arguments", [{"what": "dog", "n": None}, '{"what": "dog", "n": null}'])
def test_arguments_may_be_texts(arguments):
    (message,) = make_chat([calling(arguments)]).messages
    assert message == {
        "role": "assistant",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"what": "dog", "n": None}}}
        ],
    }


@pytest.mark.parametrize("arguments", [None, "", {}, "{}", "null"])
def test_calls_without_arguments(arguments):
    (message,) = make_chat([calling(arguments)]).messages
    assert message["tool_calls"][0]["function"] == {"name": "find", "arguments": {}}


def test_calls_without_a_function_object():
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": "{}", "id": None}]}
    (parsed,) = make_chat([message]).messages
    assert parsed["tool_calls"] == [{"type": "function", "function": {"name": "find", "arguments": {}}}]


def test_weights_say_which_answers_are_trained():
    chat = make_chat([USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1.0}, ANSWER])
    assert chat.trained == (False, False, False, True, True)
    assert not any("weight" in message for message in chat.messages)


@pytest.mark.parametrize(
    ("messages", "tools", "variables", "message"),
    [
        (None, None, None, "messages must be a non-empty list"),
        ([USER, 3], None, None, r"messages\[1\]: must be an object"),
        ([{"role": "human", "content": "x"}], None, None, r'messages\[0\]: "role" must be one of .*developer; got .human'),
        ([{"role": ["user"], "content": "x"}], None, None, '"role" must be one of'),
        (
            [USER | {"audio": {"id": "x"}}],
            None,
            None,
            r"messages\[0\]: cannot be honoured, so leave out: 'audio'; known are",
        ),
        ([ANSWER | {"refusal": "no", "prefix": True}], None, None, "leave out: 'refusal', 'prefix'"),
        ([USER | {"\x1b[31m" * 99: 1}], None, None, r"leave out: '\\x1b\[31m"),
        ([USER | {"name": 3}], None, None, '"name" must be a string; got 3'),
        ([USER | {"weight": 1}], None, None, 'only an assistant message can have a "weight"'),
        ([ANSWER | {"weight": 0.5}], None, None, '"weight" must be 0 .not trained. or 1; got 0.5'),
        ([ANSWER | {"weight": True}], None, None, '"weight" must be 0'),
        ([ANSWER | {"weight": "0"}], None, None, '"weight" must be 0'),
        ([USER | {"reasoning_content": "x"}], None, None, 'only an assistant message can have "reasoning_content"'),
        ([USER | {"tool_calls": [{"name": "f"}]}], None, None, 'only an assistant message can have "tool_calls"'),
        ([calling("[1]")], None, None, r"messages\[0\]\.tool_calls\[0\]: the arguments must be an object.*; got \[1\]"),
        ([calling("{")], None, None, "the arguments must be an object.*a text that is not JSON: "),
        ([calling(3)], None, None, "the arguments must be an object"),
        ([ANSWER | {"tool_calls": {"name": "f"}}], None, None, '"tool_calls" must be a list of objects'),
        ([ANSWER | {"tool_calls": [{"function": {}}]}], None, None, r'tool_calls\[0\] must be .*"name", "arguments"'),
        ([USER], {"name": "f"}, None, "tools must be a list of objects"),
        ([USER], "find", None, "tools must be a list of objects.*a text that is not JSON: "),
        ([USER], [TOOLS[0], "find"], None, r"tools\[1\] must be an object .*a text that is not JSON: "),
        ([USER], "[" * 100_000, None, "tools must be a list"),
        ([USER], [[]], None, r"tools\[0\] must be an object"),
        ([USER], None, ["x"], "chat_template_kwargs must be an object"),
        ([USER], None, {"messages": [], "eos_token": "x", "a": 1}, "chat_template_kwargs cannot set eos_token, messages"),
    ],
)
def test_what_is_refused(messages, tools, variables, message):
    with pytest.raises(UserError, match=message) as error:
        make_chat(messages, tools, variables)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 400


def test_all_problems_are_listed_at_once():
    with pytest.raises(UserError) as error:
        make_chat([{"role": "x", "content": 3}, USER], "x", 3)
    assert str(error.value).count("; ") >= 3


def test_variables_of_the_command_line():
    values = {
        "chat.thinking": "off",
        "chat.template_args": ["lang=de", "depth=3", 'style={"a": [true]}', "empty=", "eq=a=b"],
    }
    config = load_config(GenerateConfig, None, ["--config.model.path=x"], values)
    assert config.chat.variables == {
        "enable_thinking": False,
        "lang": "de",
        "depth": 3,
        "style": {"a": [True]},
        "empty": "",
        "eq": "a=b",
    }
    assert ChatOptions().variables == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_args": ("lang",)}, "must be name=value, and not 'lang'"),
        ({"template_args": ("a b=1",)}, "must be name=value"),
        ({"template_args": ("messages=[]",)}, "cannot set messages"),
        ({"template_args": ("enable_thinking=true",), "thinking": "off"}, "thinking sets enable_thinking, too"),
    ],
)
def test_wrong_variables_of_the_command_line(options, message):
    with pytest.raises(UsageError, match=message):
        ChatOptions(**options)
