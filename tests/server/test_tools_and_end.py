"""Tools and reasoning with a model that answers as told; keys; and how a server ends."""

import json
import pathlib
import signal

import numpy as np
import openai
import pytest
from running_server import running_server, scripted_model

from qwen_dist import DEMO_MODEL
from qwen_dist.checkpoint.adapter import Adapter, write_adapter

ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
XML = "<tool_call>\n<function=get_weather>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
QUESTION = "Weather in Oslo and Bergen?"
FORCED = '<tool_call>\n{"name": "tell", "arguments":'
ANSWERS = {
    f"{QUESTION}{ASSISTANT}": f"Let me see.\n{CALL}\n{XML}",
    f"Which one, think?{ASSISTANT}": "<think>\nHard.\n</think>\n\nOne.",
    f"Which one?{ASSISTANT}<think>\n": "Easy.\n</think>\n\nTwo.",
    f"Which one?{ASSISTANT}<think>\n\n</think>\n\n": "Three.",
    f"Which one?{ASSISTANT}": "Four.",
    FORCED: ' {"city": "Rome"}}\n</tool_call>',
    # Other tools than above: an answer is told from the 24 tokens before it, and the call above is followed by more.
    f"Anything?{ASSISTANT}<tool_call>\n": '{"name": "ask", "arguments": {}}\n</tool_call>',
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
PLACES = {"enum": ["Oslo", "Rome"]}
TIMES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 2}
VISIT = {"type": "object", "properties": {"place": PLACES, "times": TIMES}, "required": ["place", "times"]}
VISIT |= {"additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "tell", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "visit", "parameters": VISIT}},
]
CALLS = [("get_weather", {"city": "Oslo", "days": 2}), ("get_weather", {"days": 2})]
KEY = "a-secret"


ADAPTERS = ("law", "poems")


def write_random_adapter(directory, seed: int) -> None:
    config = json.loads((pathlib.Path(DEMO_MODEL) / "config.json").read_text())
    rng, sizes = np.random.default_rng(seed), {"A": (4, config["hidden_size"]), "B": (config["intermediate_size"], 4)}
    matrices = {f"layers.0.mlp.up_proj.lora_{side}.weight": rng.normal(0, 1, size) for side, size in sizes.items()}
    arrays = {name: matrix.astype(np.float32) for name, matrix in matrices.items()}
    write_adapter(directory, Adapter(4, 8.0, False, arrays), base="demo")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools")
    arguments = ["--model", str(scripted_model(directory, ANSWERS)), "--served-name", "scripted"]
    arguments += ["--max-batch-size", "2", "--config.warm_up=false"]
    for seed, name in enumerate(ADAPTERS):
        write_random_adapter(directory / name, seed)
        arguments += ["--adapter", f"{name}={directory / name}"]
    with running_server(directory, *arguments, key=KEY, QWEN_DIST_API_KEY=KEY) as running:
        yield running


def ask(server, text: str, **more):
    return server.client().chat.completions.create(model="scripted", messages=[{"role": "user", "content": text}], **more)


def calls_of(message) -> list:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def check_visit(calls: list) -> None:
    """The model knows nothing of this tool, so only the grammar makes the arguments what they must be."""
    assert calls and all(name == "visit" and arguments.keys() == {"place", "times"} for name, arguments in calls)
    for _, arguments in calls:
        assert arguments["place"] in PLACES["enum"] and 1 <= len(arguments["times"]) <= 2
        assert all(type(time) is int and 0 <= time <= 9 for time in arguments["times"])


def streamed(server, text: str, **more) -> tuple[str, list, str, str]:
    """Return content, calls, reasoning and why the answer ended, from a stream."""
    content, reasoning, calls, reason = "", "", {}, None
    for chunk in ask(server, text, stream=True, **more):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            known = calls.setdefault(call.index, [call.function.name, ""])
            known[1] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, [(name, json.loads(text)) for name, text in calls.values()], reasoning, reason


def test_tool_calls_of_both_forms(server):
    (choice,) = ask(server, QUESTION, tools=TOOLS).choices
    assert (choice.message.content, calls_of(choice.message)) == ("Let me see.", CALLS)
    assert choice.finish_reason == "tool_calls"
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert streamed(server, QUESTION, tools=TOOLS) == ("Let me see.", CALLS, "", "tool_calls")
    assert streamed(server, QUESTION, tools=TOOLS, parallel_tool_calls=False)[1] == CALLS[:1]
    assert calls_of(ask(server, QUESTION, tools=TOOLS, parallel_tool_calls=False).choices[0].message) == CALLS[:1]


def test_a_conversation_with_a_result_of_a_tool(server):
    message = ask(server, QUESTION, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls]
    message.tool_calls[0].function.arguments = ""  # as clients send it for a tool without parameters
    messages = [{"role": "user", "content": QUESTION}, message, *results, {"role": "user", "content": "Which one?"}]
    given = server.client().chat.completions.create(model="scripted", messages=messages, tools=TOOLS)
    assert given.choices[0].message.content == "Four."


def test_the_choice_of_a_tool(server):
    none = ask(server, QUESTION, tools=TOOLS, tool_choice="none").choices[0]
    assert (none.message.content, none.finish_reason) == (ANSWERS[f"{QUESTION}{ASSISTANT}"], "stop")
    named = {"type": "function", "function": {"name": "tell"}}
    forced = ask(server, "Hello.", tools=TOOLS, tool_choice=named).choices[0]
    assert calls_of(forced.message) == [("tell", {"city": "Rome"})]
    assert streamed(server, "Anything?", tools=TOOLS, tool_choice="required")[1:] == ([("ask", {})], "", "tool_calls")


def test_the_arguments_of_a_forced_call_have_the_schema(server):
    named = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "visit"}}, "temperature": 1.5}
    for seed in range(3):
        given = ask(server, "Hello.", **named, seed=seed, n=2)
        for choice in given.choices:
            check_visit(calls_of(choice.message))
            assert (choice.message.content, choice.finish_reason, len(choice.message.tool_calls)) == (None, "tool_calls", 1)
        content, calls, reasoning, reason = streamed(server, "Hello.", **named, seed=seed)
        assert (content, calls, reasoning, reason) == ("", calls_of(given.choices[0].message), "", "tool_calls")
    (cut,) = ask(server, "Hello.", **named, max_completion_tokens=1).choices
    assert (cut.message.tool_calls, cut.message.content, cut.finish_reason) == (None, "", "length")
    assert streamed(server, "Hello.", **named, max_completion_tokens=1) == ("", [], "", "length")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    check_visit(calls_of(ask(server, "Hello.", **named, extra_body=thinking).choices[0].message))
    only = {"tools": TOOLS[-1:], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
    check_visit(streamed(server, "Hello.", **only)[1])
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": 3}}}}]
    with pytest.raises(openai.BadRequestError, match="tool_choice: ") as error:
        ask(server, "Hello.", tools=wrong, tool_choice="required")
    assert error.value.param == "tool_choice"


@pytest.mark.slow
def test_forced_calls_in_the_form_of_qwen3_coder(tmp_path):
    """Its template has the XML form, and so the calls."""
    model = scripted_model(tmp_path, {"Never asked?": "No."})
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = settings["chat_template"].replace("{%- if tools %}", "{%- if tools %}{{- '<function=name>' }}")
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    arguments = ("--model", str(model), "--served-name", "scripted", "--max-batch-size", "2", "--config.warm_up=false")
    with running_server(tmp_path, *arguments) as server:
        named = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "visit"}}, "seed": 1}
        (choice,) = ask(server, "Hello.", **named, logprobs=True, temperature=1.0).choices
        text = "".join(token.token for token in choice.logprobs.content)
        assert text.startswith("<parameter=place>\n") and text.endswith("</parameter>\n</function>\n</tool_call>")
        assert all(token.top_logprobs == [] for token in choice.logprobs.content)
        check_visit(calls_of(choice.message))
        assert streamed(server, "Hello.", **named, temperature=1.0)[1] == calls_of(choice.message)


def test_reasoning_is_apart_from_the_content(server):
    (choice,) = ask(server, "Which one, think?").choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Hard.", "One.")
    assert streamed(server, "Which one, think?") == ("One.", [], "Hard.", "stop")
    for thinking, expected in ((True, ("Two.", [], "Easy.", "stop")), (False, ("Three.", [], "", "stop"))):
        variables = {"chat_template_kwargs": {"enable_thinking": thinking}}
        assert streamed(server, "Which one?", extra_body=variables) == expected
    assert ask(server, "Which one?").choices[0].message.content == "Four."


def test_adapters_are_chosen_by_name(server):
    client = server.client()
    assert [(model.id, model.parent) for model in client.models.list().data] == [
        ("scripted", None),
        *((name, "scripted") for name in ADAPTERS),
    ]
    texts = {}
    for name in ("scripted", *ADAPTERS):
        given = client.completions.create(model=name, prompt="One, two,", max_tokens=12, temperature=0)
        assert given.model == name
        texts[name] = given.choices[0].text
    assert len(set(texts.values())) == 3
    with pytest.raises(openai.NotFoundError, match="this server has 'scripted', 'law', 'poems'"):
        client.completions.create(model="other", prompt="a")


def test_without_the_key_only_health_answers(server):
    for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}"):
        answer = server.post("/v1/chat/completions", b"{}", authorization=given)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()
    assert server.post("/health", b"", authorization="").status_code == 405
    assert server.post("/v1/chat/completions", b"{}").status_code == 400


def test_sigterm_finishes_what_runs_and_takes_nothing_new(server):
    """The last test of the module: it ends the server."""
    wanted = {"temperature": 0, "max_tokens": 900, "extra_body": {"min_tokens": 900}, "stream": True}
    stream = server.client().completions.create(model="scripted", prompt="Count:", **wanted)
    first = next(stream)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_line("stopping: ")
    refused = server.post("/v1/completions", b'{"prompt": "a"}')
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
    rest = list(stream)
    assert first.choices[0].finish_reason is None and rest[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
    assert server.stderr.read_text().endswith("stopped\n")
