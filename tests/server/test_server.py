"""`qwen-dist serve` on the demonstration model, with OpenAI's client over a socket."""

import concurrent.futures
import contextlib
import json
import re
import socket
import time
from typing import Annotated, Literal

import httpx2 as httpx
import jax
import numpy as np
import openai
import pydantic
import pytest
from running_server import RunningServer, running_server
from wrong_bodies import CHAT, OK, TEXT, WRONG_BYTES, WRONG_CHATS, WRONG_TEXTS, chat

import qwen_dist
from qwen_dist import LLM
from qwen_dist.cli import main

QUESTIONS = [f"What is {a} plus {b}?" for a in range(1, 6) for b in range(2, 6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with four slots, and room for 60 answers that wait."""
    arguments = ["--max-batch-size", "4", "--max-waiting", "60", "--max-body-size", "100kB", "--config.header_timeout=2"]
    with running_server(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def llm():
    return LLM(qwen_dist.DEMO_MODEL, dtype="float32", max_batch_size=4, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def expected(llm):
    """The answers to all questions, after a warm-up; no question compiled a program."""
    engine = llm._engine
    engine.warm_up()
    programs = engine._runner._prefill._cache_size(), engine._runner._decode._cache_size()
    assert programs == (3, 4)
    answers = llm.chat([chat(question) for question in QUESTIONS])
    assert programs == (engine._runner._prefill._cache_size(), engine._runner._decode._cache_size())
    return answers


# --- answers ---


def test_answers_are_those_of_the_library(client, expected):
    for question, answer in list(zip(QUESTIONS, expected, strict=True))[:3]:
        given = client.chat.completions.create(model="demo", messages=chat(question))
        (choice,) = given.choices
        assert (choice.message.content, choice.finish_reason) == (answer.text, answer.finish_reason)
        parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        assert client.chat.completions.create(model="demo", messages=parts).choices[0].message == choice.message
        assert choice.message.role == "assistant" and choice.message.tool_calls is None and choice.logprobs is None
        assert given.usage.prompt_tokens == len(answer.prompt_token_ids)
        assert given.usage.completion_tokens == len(answer.token_ids)
        assert given.id.startswith("chatcmpl-") and given.model == "demo" and given.object == "chat.completion"


def test_twenty_streams_at_once_are_each_what_it_is_alone(client, expected):
    def stream(question: str) -> tuple[str, str, int]:
        text, reason, roles = "", None, []
        options = {"include_usage": True}
        for chunk in client.chat.completions.create(
            model="demo", messages=chat(question), stream=True, stream_options=options
        ):
            assert chunk.object == "chat.completion.chunk"
            if not chunk.choices:
                return text, reason, chunk.usage.completion_tokens
            (choice,) = chunk.choices
            assert reason is None and chunk.usage is None
            roles += [choice.delta.role] if choice.delta.role else []
            text, reason = text + (choice.delta.content or ""), choice.finish_reason
            assert roles == ["assistant"]
        raise AssertionError("the last chunk has the usage")

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(stream, QUESTIONS))
    assert answers == [(answer.text, answer.finish_reason, len(answer.token_ids)) for answer in expected]


def test_texts_are_continued_and_scored(client, llm):
    prompts = ["The capital of France", llm.encode("One, two,")]
    given = client.completions.create(model="demo", prompt=prompts, max_tokens=6, echo=True, logprobs=1)
    answers = llm.generate([llm.encode(prompts[0]), prompts[1]], max_new_tokens=6, logprobs=1, prompt_logprobs=1)
    assert [choice.index for choice in given.choices] == [0, 1]
    for choice, prompt, answer in zip(given.choices, ["The capital of France", "One, two,"], answers, strict=True):
        assert choice.text == prompt + answer.text
        assert choice.logprobs.token_logprobs[0] is None
        known = [token.logprob for token in answer.prompt_logprobs + answer.logprobs]
        assert choice.logprobs.token_logprobs[1 : 1 + len(known)] == pytest.approx(known, abs=1e-5)
        assert len(choice.logprobs.tokens) == len(answer.prompt_token_ids) + len(answer.token_ids)
        assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert given.usage.prompt_tokens == sum(len(answer.prompt_token_ids) for answer in answers)
    wanted = {"model": "demo", "prompt": "The sky", "max_tokens": 8, "stream": True}
    chunks = list(client.completions.create(**wanted, stream_options={"include_usage": False}))
    assert all(chunk.usage is None and chunk.choices[0].logprobs is None for chunk in chunks)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == llm.generate("The sky", max_new_tokens=8)[0].text


def test_log_probabilities_of_a_text_have_the_token_that_ends_it(client, llm, expected):
    """As clients such as lm-eval expect: an entry for each token that `usage` counts."""
    prompt = expected[0].prompt_token_ids
    wanted = {"model": "demo", "prompt": list(prompt), "max_tokens": 300, "logprobs": 1, "temperature": 0}
    given = client.completions.create(**wanted)
    (choice,) = given.choices
    assert choice.finish_reason == "stop" and len(choice.logprobs.tokens) == given.usage.completion_tokens
    assert "".join(choice.logprobs.tokens[:-1]) == choice.text == expected[0].text
    assert (choice.logprobs.tokens[-1], choice.logprobs.text_offset[-1]) == ("<|im_end|>", len(choice.text))
    scored = llm.score([[*prompt, *expected[0].token_ids]])[0].logprobs[-len(expected[0].token_ids) :]
    assert choice.logprobs.token_logprobs == pytest.approx(scored, abs=1e-4)
    held = [choice.text[5:8] + "\x01"]  # a stop string that begins in the text and does not come, so the text waits
    chunks = [one.choices[0].logprobs for one in client.completions.create(**wanted, stop=held, stream=True)]
    streamed = [value for logprobs in chunks if logprobs for value in logprobs.token_logprobs]
    assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
    offsets = [offset for logprobs in chunks if logprobs for offset in logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset
    for number in (0, 3):  # the token itself is among the best, or one more
        tops = client.completions.create(**wanted | {"logprobs": number, "temperature": 1.5, "seed": 1}).choices[0].logprobs
        for token, value, top in zip(tops.tokens, tops.token_logprobs, tops.top_logprobs, strict=True):
            assert max(number, 1) <= len(top) <= number + 1 and top[token] == value
    echoed = client.completions.create(
        **wanted | {"max_tokens": 1, "prompt": [*prompt, *expected[0].token_ids[:-1]]}, echo=True
    )
    assert len(echoed.choices[0].logprobs.tokens) == len(prompt) + len(expected[0].token_ids)


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(client):
    wanted = {"model": "demo", "messages": chat(QUESTIONS[0]), "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**wanted).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**wanted, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in whole], abs=1e-5)
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.logprob for token in whole)


def test_choices_seeds_and_stops(client, llm, expected):
    wanted = {"model": "demo", "messages": chat("Tell me something new."), "n": 4, "temperature": 2.0, "max_tokens": 12}
    first, again = (client.chat.completions.create(**wanted, seed=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 4
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    for chunk in client.chat.completions.create(**wanted, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    # Without a seed every request has its own.
    unseeded = {
        tuple(choice.message.content for choice in client.chat.completions.create(**wanted).choices) for _ in range(2)
    }
    assert len(unseeded) == 2
    (token,) = llm.encode("a")
    biased = {"model": "demo", "prompt": "Say:", "max_tokens": 3, "logit_bias": {str(token): 100}, "temperature": 0}
    assert client.completions.create(**biased).choices[0].text == "aaa"
    answer = expected[0].text
    stopped = client.chat.completions.create(model="demo", messages=chat(QUESTIONS[0]), stop=[answer[4:7]])
    assert stopped.choices[0].message.content == answer[: answer.find(answer[4:7])]
    assert stopped.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model="demo", messages=chat(QUESTIONS[0]), max_completion_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)


class Weather(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    degrees: Annotated[int, pydantic.Field(ge=-50, le=50)]


def test_structured_output(client, expected):
    wanted = {"model": "demo", "messages": chat(QUESTIONS[0])}
    parsed = client.chat.completions.parse(**wanted, response_format=Weather).choices[0]
    assert isinstance(parsed.message.parsed, Weather) and parsed.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**wanted, stream=True, extra_body={"guided_choice": ["maybe", "no"]}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in ("maybe", "no")
    chosen = client.chat.completions.create(**wanted, logprobs=True, top_logprobs=5, extra_body={"guided_choice": ["no"]})
    tops = [top for token in chosen.choices[0].logprobs.content for top in token.top_logprobs]
    assert tops and all(top.logprob > -9999 for top in tops)  # those of the model, also of what may not be sampled
    loose = client.chat.completions.create(**wanted, max_tokens=20, response_format={"type": "json_object"}).choices[0]
    assert loose.message.content.startswith("{") and (loose.finish_reason == "length" or json.loads(loose.message.content))
    free = {"structured_outputs": {"regex": "(?s:.*)"}}
    answers = client.chat.completions.create(**wanted, logprobs=True, n=2, extra_body=free).choices
    assert [choice.message.content for choice in answers] == [expected[0].text] * 2
    of_text = client.completions.create(model="demo", prompt=["a", "b"], extra_body={"guided_regex": "[xy]{3}"}, n=2)
    assert all(re.fullmatch("[xy]{3}", choice.text) for choice in of_text.choices) and len(of_text.choices) == 4


def test_embeddings(server, client, llm):
    texts = ["The sky is blue.", "What is 2 plus 3?"]
    wanted = llm.embed(texts)
    given = client.embeddings.create(model="demo", input=texts)  # the client asks for base64
    assert [entry.index for entry in given.data] == [0, 1] and given.usage.prompt_tokens == sum(
        map(len, map(llm.encode, texts))
    )
    np.testing.assert_allclose([entry.embedding for entry in given.data], wanted, atol=1e-5)
    of_tokens = client.embeddings.create(model="demo", input=llm.encode(texts[1]), encoding_format="float", dimensions=8)
    np.testing.assert_allclose(of_tokens.data[0].embedding, llm.embed(texts[1], dimensions=8)[0], atol=1e-5)
    wrong = [({"input": ""}, "input"), ({"input": []}, "input"), ({"input": [[]]}, "input"), ({"input": {}}, "input")]
    wrong += [({"input": "a", "dimensions": 0}, "dimensions"), ({"input": "a", "dimensions": 10**6}, "dimensions")]
    wrong += [({"input": "a", "encoding_format": "hex"}, "encoding_format"), ({"input": "a", "model": 3}, "model")]
    wrong += [({"input": "a", "prompt": "b"}, None), ({"input": [99999]}, None), ({"input": ["a"] * 2049}, "input")]
    for body, param in wrong:
        error = check_error(server.post("/v1/embeddings", json.dumps(body).encode()))
        assert error["param"] == param, (body, error)
    long = check_error(server.post("/v1/embeddings", json.dumps({"input": [5] * 1024}).encode()))
    assert (long["code"], long["param"]) == ("context_length_exceeded", "input")


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_the_cache(server, client):
    prompt = [5 + number % 200 for number in range(150)]
    before = server.metric("cached_tokens_total")
    wanted = {"model": "demo", "max_tokens": 2, "stream_options": {"include_usage": True}, "stream": True}
    first, again = (list(client.completions.create(prompt=[*prompt, tail], **wanted))[-1].usage for tail in (7, 8))
    assert (first.prompt_tokens, first.prompt_tokens_details.cached_tokens) == (151, 0)
    assert (again.prompt_tokens, again.prompt_tokens_details.cached_tokens) == (151, 128)
    whole = client.completions.create(model="demo", max_tokens=2, prompt=[prompt, prompt]).usage
    assert (whole.prompt_tokens, whole.prompt_tokens_details.cached_tokens) == (300, 256)
    assert server.metric("cached_tokens_total") == before + 128 + 256


def test_models_health_and_metrics(server, client):
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    assert httpx.get(f"{server.url}/health", timeout=60).json() == {"status": "ok", "model": "demo"}
    assert server.metric("answers_total") > 0 and server.metric("generated_tokens_total") > 0


# --- errors ---


def check_error(answer: httpx.Response, status: int = 400) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and len(body["error"]["message"]) <= 1001
    return body["error"]


def test_wrong_bodies_are_answered_one_by_one_with_what_is_wrong(server):
    assert len(WRONG_CHATS) + len(WRONG_TEXTS) + len(WRONG_BYTES) > 100
    with httpx.Client(base_url=server.url, headers={"content-type": "application/json"}, timeout=60) as web:
        for path, wrong in ((CHAT, WRONG_CHATS), (TEXT, WRONG_TEXTS)):
            for body, param in wrong:
                error = check_error(web.post(path, content=json.dumps(body)))
                assert error["type"] == "invalid_request_error"
                assert error["param"] == param, (body, error)
        for content in WRONG_BYTES:
            for path in (CHAT, TEXT):
                check_error(web.post(path, content=content))
        long = check_error(web.post(CHAT, json={"messages": chat("word " * 3000)}))
        assert (long["code"], long["param"]) == ("context_length_exceeded", "messages")
        assert check_error(web.post(TEXT, json={"prompt": [5] * 1024}))["code"] == "context_length_exceeded"
        assert check_error(web.post(CHAT, json=OK | {"model": "gpt"}), 404)["code"] == "model_not_found"
        assert check_error(web.post("/v1/chat", json=OK), 404)["code"] == "not_found"
        assert check_error(web.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
        assert check_error(web.get(CHAT), 405)["code"] == "method_not_allowed"
        assert check_error(web.post(CHAT, json={"messages": chat("x" * 200_000)}), 413)["code"] == "body_too_large"
        pieces = (b" " * 50_000 for _ in range(4))  # without a length
        assert check_error(web.post(CHAT, content=pieces), 413)["code"] == "body_too_large"
        as_form = web.post(CHAT, content=json.dumps(OK), headers={"content-type": "text/plain"})
        assert check_error(as_form, 415)["code"] == "not_json"
        assert web.post(CHAT, json=OK).status_code == 200, "the connection and the server still work"


def test_a_client_gets_errors_of_its_own_classes(client):
    with pytest.raises(openai.BadRequestError, match="the regular expression for structured output cannot be used"):
        client.chat.completions.create(model="demo", messages=chat("a"), extra_body={"guided_regex": "("})
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        client.chat.completions.create(model="other", messages=chat("a"))


# --- load ---

LONG, FORCED = {"prompt": "Count:", "max_tokens": 900}, {"min_tokens": 900}


def asking(server: RunningServer, body: dict) -> socket.socket:
    """Return a connection on which a body has been sent."""
    content = json.dumps(body)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall((head + content).encode())
    return connection


def test_a_client_that_goes_away_frees_its_slot(server, client):
    before, gone = server.metric("generated_tokens_total"), server.metric("disconnects_total")
    stream = client.completions.create(model="demo", stream=True, **LONG, extra_body=FORCED)
    next(stream)
    with contextlib.ExitStack() as stack:
        for _ in range(6):  # four answers are computed, and three wait
            stack.enter_context(asking(server, LONG | FORCED))
        server.wait_for_metric("num_waiting", 3)
        assert server.metric("held_positions") > 0
    stream.close()
    for name in ("num_waiting", "num_running", "held_positions"):
        server.wait_for_metric(name, 0)
    server.wait_for_metric("disconnects_total", gone + 7)
    assert server.metric("generated_tokens_total") - before < 7 * 900


def test_too_many_requests_are_refused(server, client):
    with asking(server, LONG | FORCED | {"n": 32}), asking(server, LONG | FORCED | {"n": 32}):
        server.wait_for_metric("num_waiting", 60)
        with pytest.raises(openai.RateLimitError, match="of at most 64; try again later"):
            client.completions.create(model="demo", prompt="a")
    server.wait_for_metric("num_running", 0)
    assert client.completions.create(model="demo", prompt="a", max_tokens=1).choices[0].text


def test_a_head_that_does_not_come_ends_the_connection(server):
    port = int(server.url.rpartition(":")[2])
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost:"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(sent)
            start = time.monotonic()
            assert connection.recv(10) == b""
            assert 1 < time.monotonic() - start < 15


# --- the command ---


def test_what_cannot_be_served_ends_with_one_line(capsys, server):
    def code_and_message(*arguments: str) -> tuple[int, str]:
        code = main(["serve", *arguments])
        return code, capsys.readouterr().err.splitlines()[-1]

    port = server.url.rpartition(":")[2]
    assert code_and_message("--port", port) == (
        1,
        f"qwen-dist serve: cannot serve on 127.0.0.1 port {port}: Address already in use; choose a free --port, and an "
        "address of this machine as --host",
    )
    code, message = code_and_message("--model", "/nowhere", "--port", "0")
    assert code == 1 and message.startswith("qwen-dist serve: ") and "/nowhere" in message
    code, message = code_and_message("--adapter", "demo=some/dir")
    assert code == 2 and "give each adapter a different name, and not demo" in message
    code, message = code_and_message("--adapter", "some/dir", "--adapter", "other/dir")
    assert code == 2 and "only one can be merged; give them names to serve all: --adapter NAME=DIR" in message
    code, message = code_and_message("--port", "70000", "--request-timeout", "0")
    assert code == 2 and "port is 70000" in message and "request_timeout is 0" in message


def test_the_server_has_written_only_what_it_should(server: RunningServer):
    """The last test of the module: no traceback, no line for each wrong request."""
    lines = server.stderr.read_text().splitlines()
    assert lines[0].startswith("loading ") and lines[-1].startswith("ready: demo at http://127.0.0.1:")
    assert [line for line in lines if line.startswith("compiling: ")][-1] == "compiling: 24 of 24 programs"
