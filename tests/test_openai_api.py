"""Bodies and answers of the OpenAI API, without a batch: what a server needs."""

import dataclasses
import itertools

import pytest

from qwen_dist.engine.request import RequestOutput, SamplingParams, StructuredOutputs, TokenLogprob
from qwen_dist.errors import UserError
from qwen_dist.openai_api import (
    ApiRequest,
    PendingAnswer,
    begins_with_reasoning,
    completion_body,
    error_body,
    make_requests,
    parse_body,
)
from qwen_dist.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    return Tokenizer.open(small_tokenizer)


def test_a_body_is_a_request_or_all_of_its_problems():
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 4, "n": 2, "stream": False}
    assert parse_body(body, is_chat=True) == ApiRequest({"max_new_tokens": 4}, messages=MESSAGES, model="m", num_choices=2)
    with pytest.raises(UserError) as error:
        parse_body({"prompt": 3, "n": 0, "audio": {}}, is_chat=False)
    assert str(error.value) == (
        "prompt must be a string or a list of token ids; got 3; n must be a whole number from 1 to 128; got 0; cannot be "
        "honoured, so leave out: audio"
    )
    with pytest.raises(UserError, match='body must be an object with "prompt"; got None'):
        parse_body(None, is_chat=False)
    assert error_body("no", "c") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "c"}
    }


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, {"json": SCHEMA}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"], "response_format": {"type": "text"}}, {"choice": ["a"]}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"guided_json": SCHEMA, "tool_choice": None}, {"json": SCHEMA}),
        ({"guided_json": SCHEMA, "tools": [{}], "tool_choice": "none"}, {"json": SCHEMA}),
    ],
)
def test_the_fields_of_structured_output(fields, expected):
    params = parse_body({"messages": MESSAGES, **fields}, is_chat=True).params
    assert params == ({} if expected is None else {"structured_outputs": StructuredOutputs(**expected)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": 3}, 'response_format must be of type "text", "json_object", or "json_schema" with'),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format must be of type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format must be of type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format must be of type"),
        ({"structured_outputs": {}}, "structured_outputs must be an object with one of json, json_object, regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs must be an object with one of"),
        ({"structured_outputs": {"regex": "a", "more": 1}}, "structured_outputs must be an object with one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs: choice must be a list of non-empty texts; got"),
        ({"guided_regex": 3}, "guided_regex: regex must be a regular expression; got 3"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json and guided_regex are both given; give one of them"),
        ({"guided_regex": "a", "tools": [{}]}, "guided_regex excludes tools: leave one of them out, or give tool_choice"),
    ],
)
def test_structured_output_that_is_not_understood(fields, message):
    with pytest.raises(UserError) as error:
        parse_body({"messages": MESSAGES, **fields}, is_chat=True)
    assert str(error.value).startswith(message)


def test_a_form_begins_after_the_reasoning(tokenizer):
    request = parse_body({"messages": MESSAGES, "guided_choice": ["a"]}, is_chat=True)
    assert requests_of(request, tokenizer)[0].params.structured_outputs == StructuredOutputs(choice=("a",))
    (thinking,) = requests_of(dataclasses.replace(request, messages=None, prompt="a<think>\n"), tokenizer)
    assert thinking.params.structured_outputs.after == "", "a text is no chat"
    assert begins_with_reasoning(tokenizer.encode("a <think>\n"), tokenizer)
    assert not begins_with_reasoning(tokenizer.encode("<think>\n\n</think>\n"), tokenizer)


def requests_of(request, tokenizer):
    return make_requests(request, tokenizer, SamplingParams(seed=5), lambda index: index, max_context=99, variables={})


def test_choices_are_requests_with_their_own_seeds(tokenizer):
    one, other = requests_of(ApiRequest({}, messages=MESSAGES, num_choices=2), tokenizer)
    assert (one.key, other.key, one.params.seed, other.params.seed) == (0, 1, 5, 6)
    assert list(one.prompt) == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert one.prompt == other.prompt and one.params.stop_token_ids == tokenizer.chat_stop_ids
    with pytest.raises(UserError, match="at most 99 fit"):
        requests_of(ApiRequest({}, prompt="fox " * 10**5), tokenizer)


def output(request, text, tokens, reason=None, num_generated=0, **more) -> RequestOutput:
    logprobs = tuple(TokenLogprob(token, -0.5, ((token, -0.5),)) for token in tokens)
    return RequestOutput(request, text, tuple(tokens), num_generated, reason, logprobs, **more)


def test_outputs_become_one_body(tokenizer):
    request = parse_body({"messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 1}, is_chat=True)
    answer, (first, second) = PendingAnswer(request, tokenizer), requests_of(request, tokenizer)
    brown, dog = (tokenizer.encode(word) for word in ("brown", " dog"))
    tokens = brown + dog
    assert not answer.add(1, output(second, "brown", brown))
    assert not answer.add(1, output(second, " dog", dog, "length", len(tokens), num_cached_tokens=128))
    assert answer.add(0, output(first, "", [], "stop", 1, num_cached_tokens=64))
    body = completion_body(request, answer.in_order(), answer.num_prompt_tokens, 7)
    num_prompt = len(first.prompt)
    assert (body["id"], body["object"]) == ("chatcmpl-7", "chat.completion")
    num_answer = len(tokens) + 1
    # The prompt counts once, and what one choice read from the other's pages had to be computed for that one.
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["", "brown dog"]
    entries = body["choices"][1]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == "brown dog" and len(entries) == len(tokens)
    assert all(entry["top_logprobs"] == [{key: entry[key] for key in ("token", "logprob", "bytes")}] for entry in entries)
    assert bytes(itertools.chain.from_iterable(entry["bytes"] for entry in entries)) == b"brown dog"


def test_an_echoed_text_has_the_log_probabilities_of_the_prompt(tokenizer):
    request = parse_body({"prompt": "the fox", "echo": True, "max_tokens": 0, "logprobs": 0}, is_chat=False)
    answer, (one,) = PendingAnswer(request, tokenizer), requests_of(request, tokenizer)
    scores = tuple(TokenLogprob(token, -1.0, ()) for token in one.prompt[1:])
    assert answer.add(0, output(one, "", [], "length", 0, prompt_logprobs=scores))
    (choice,) = completion_body(request, answer.in_order(), answer.num_prompt_tokens, 1)["choices"]
    assert choice["text"] == "the fox" == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"] == [None, *[-1.0] * (len(one.prompt) - 1)]
