"""Batch inference: every line is answered once, independently of the other lines."""

import dataclasses
import itertools
import json

import pytest

from qwen_dist.batch import run
from qwen_dist.batch.jsonl import BatchRecord, read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.batch.run import BatchSummary, run_batch
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import TAKEN_AHEAD
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request
from qwen_dist.openai_api import ApiRequest
from qwen_dist.ops.paged_cache import PAGE

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def is_prime(n):"}]
LINES = [
    {"id": "plain", "prompt": "the quick brown fox"},
    {"id": 7, "prompt": "日本語 😀", "max_new_tokens": 3},
    {"id": "chat", "messages": MESSAGES, "logprobs": 2},
    {"custom_id": "openai", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": MESSAGES}},
    {
        "custom_id": "openai sampled",
        "body": {"messages": MESSAGES, "max_tokens": 4, "temperature": 1, "seed": 3, "logprobs": True, "top_logprobs": 1},
    },
    {"id": "one char", "prompt": "a", "repetition_penalty": 1.5},
]
BAD = {
    "no prompt": ({"id": "no prompt"}, "give either prompt or messages"),
    "too long": ({"id": "too long", "prompt": "a " * 300}, "tokens and the model's context 256"),
    "out of range": ({"id": "out of range", "prompt": "a", "top_p": 7}, "top_p is 7; it must be above 0 and at most 1"),
    "misspelt": ({"id": "misspelt", "prompt": "a", "temprature": 1}, "unknown temprature"),
    "poet": ({"id": "poet", "messages": [{"role": "poet", "content": "x"}]}, "must be one of system, user,"),
    "image": ({"id": "image", "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "reads text only"),
    "line-7": ("{", "the line is not JSON"),
    "openai bad": (
        {"custom_id": "openai bad", "body": {"messages": MESSAGES, "stream": True}},
        "cannot be honoured, so leave out: stream",
    ),
    "audio": (
        {"id": "audio", "messages": [MESSAGES[1] | {"audio": {}, "function_call": "f"}]},
        "leave out: 'function_call'",
    ),
    "variable": ({"id": "variable", "prompt": "a", "chat_template_kwargs": {"lang": "de"}}, "does not use lang"),
    "kwargs": ({"id": "kwargs", "prompt": "a", "chat_template_kwargs": ["lang"]}, "chat_template_kwargs must be an object"),
    "far too long": ({"id": "far too long", "prompt": "a " * 2**20}, "has 2097152 bytes and so at least"),
    "plain": ({"id": "plain", "prompt": "again"}, "the id 'plain' is already that of an earlier line"),
}


@pytest.fixture(scope="module")
def opened(tiny_directory):
    """Engine, tokenizer and default sampling of a tiny checkpoint; answers of six tokens, eight at a time."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 10, "max_position_embeddings": 256}
    options = ModelOptions(str(tiny_directory("qwen3", **sizes)), dtype="float32")
    return open_engine(options, "", SamplingOptions(max_new_tokens=6), max_batch_size=8)


@pytest.fixture
def answer(opened, tmp_path):
    """A function (lines, **options of run_batch) -> the results in the order of writing, and the summary."""

    def answer(lines, **options) -> tuple[list[dict], BatchSummary]:
        input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        input.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        with OutputFile(output, overwrite=True) as writer:
            summary = run_batch(*opened, read_records(input), writer, **options)
        return [json.loads(line) for line in output.read_text().splitlines()], summary

    return answer


def by_id(results: list[dict]) -> dict:
    named = {result.get("custom_id", result["id"]): result for result in results}
    assert len(named) == len(results)
    return named


def alone(opened, prompt: list[int], **params) -> dict:
    """Return the prompt's result when the engine runs no other request."""
    engine, _, defaults = opened
    *_, last = updates = list(engine.run([Request(None, tuple(prompt), defaults.override(params))]))
    return {
        "text": "".join(update.text for update in updates),
        "finish_reason": last.finish_reason,
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": last.num_generated},
    }


def test_every_format_gets_the_result_of_a_run_alone(opened, answer):
    _, tokenizer, _ = opened
    results, summary = answer(LINES)
    named = by_id(results)
    assert named.keys() == {"plain", 7, "chat", "openai", "openai sampled", "one char"}

    def chat(text: str) -> list[int]:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}])

    conversation = tokenizer.apply_chat_template(MESSAGES)
    assert named["plain"] == {"id": "plain"} | alone(opened, chat("the quick brown fox"))
    assert named[7] == {"id": 7} | alone(opened, chat("日本語 😀"), max_new_tokens=3)
    assert named["one char"] == {"id": "one char"} | alone(opened, chat("a"), repetition_penalty=1.5)

    logprobs = named["chat"].pop("logprobs")
    assert named["chat"] == {"id": "chat"} | alone(opened, conversation)
    assert len(logprobs) == 6
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] < 0 for entry in logprobs)
    assert logprobs[0]["logprob"] == logprobs[0]["top_logprobs"][0]["logprob"]  # greedy takes the most likely token

    for name, params in (("openai", {}), ("openai sampled", {"max_new_tokens": 4, "temperature": 1, "seed": 3})):
        line, expected = named[name], alone(opened, conversation, **params)
        assert (line["response"]["status_code"], line["error"]) == (200, None)
        (choice,) = line["response"]["body"]["choices"]
        assert choice["message"]["content"] == expected["text"]
        assert choice["finish_reason"] == expected["finish_reason"]
        total = sum(expected["usage"].values())
        usage = line["response"]["body"]["usage"]
        cached = usage.pop("prompt_tokens_details")["cached_tokens"]
        assert cached in (0, (usage["prompt_tokens"] - 1) // PAGE * PAGE)  # depends on the records before
        assert usage == expected["usage"] | {"total_tokens": total}
    assert len(named["openai sampled"]["response"]["body"]["choices"][0]["logprobs"]["content"]) == 4
    assert named["openai"]["response"]["body"]["choices"][0]["logprobs"] is None

    assert (summary.num_answered, summary.num_errors) == (6, 0)
    counts = [result["usage"] if "usage" in result else result["response"]["body"]["usage"] for result in results]
    assert summary.num_prompt_tokens == sum(usage["prompt_tokens"] for usage in counts)
    assert summary.num_generated_tokens == sum(usage["completion_tokens"] for usage in counts)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": 2}}}
CALL_AS_TEXT = {"type": "function", "function": {"name": "find", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


def test_tools_calls_and_variables_of_the_template_have_one_form(opened, answer):
    tokenizer = opened[1]
    calling = [MESSAGES[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
    as_text = [calling[0], calling[1] | {"content": None, "refusal": None, "tool_calls": [CALL_AS_TEXT]}, calling[2]]
    expected = alone(opened, tokenizer.apply_chat_template(calling, tools=TOOLS, enable_thinking=False))
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    results, _ = answer(
        [
            {"id": "object", "messages": calling, "tools": TOOLS} | variables,
            {"id": "text", "messages": as_text, "tools": json.dumps(TOOLS)} | variables,
            {"custom_id": "openai", "body": {"messages": as_text, "tools": TOOLS, "tool_choice": "auto"} | variables},
            {"custom_id": "none", "body": {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none"}},
        ]
    )
    named = by_id(results)
    for name in ("object", "text"):
        assert named[name] == {"id": name} | expected
    body = named["openai"]["response"]["body"]
    assert body["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert body["choices"][0]["message"]["content"] == expected["text"]
    without_tools = len(tokenizer.apply_chat_template(MESSAGES))
    assert named["none"]["response"]["body"]["usage"]["prompt_tokens"] == without_tools


def test_developer_messages_are_system_messages_where_the_template_has_no_others(opened, answer):
    lines = [
        {"id": role, "messages": [{"role": role, "content": "Be brief."}, MESSAGES[1]]} for role in ("developer", "system")
    ]
    named = by_id(answer(lines)[0])
    assert named["developer"] == named["system"] | {"id": "developer"}


@pytest.mark.parametrize(("raw", "is_chat"), [(False, True), (True, False)])
def test_a_chat_also_ends_where_its_template_ends_answers(opened, raw, is_chat):
    engine, tokenizer, defaults = opened
    options = {"raw": raw, "variables": {}}
    record = BatchRecord("a", 1, "plain", ApiRequest({}, prompt="fox"))
    (request,) = run._make_requests(record, engine, tokenizer, defaults, **options)
    assert request.params.stop_token_ids == (tokenizer.chat_stop_ids if is_chat else ())
    assert tokenizer.chat_stop_ids == (tokenizer.special_id("<|im_end|>"),)


def test_variables_of_a_run_are_those_of_records_that_set_none(opened, answer):
    off, on = ({"enable_thinking": value} for value in (False, True))
    lines = [{"id": "run", "prompt": "fox"}, {"id": "own", "prompt": "fox", "chat_template_kwargs": on}]
    named = by_id(answer(lines, variables=off)[0])
    for name, variables in (("run", off), ("own", on)):
        chat = opened[1].apply_chat_template([{"role": "user", "content": "fox"}], **variables)
        assert named[name] == {"id": name} | alone(opened, chat)


def test_invalid_lines_get_errors_and_the_run_continues(opened, answer):
    good, _ = answer(LINES)
    bad_lines = [line for line, _ in BAD.values()]
    results, summary = answer([LINES[0], *bad_lines[:5], bad_lines[6], bad_lines[5], *bad_lines[7:], *LINES[1:]])
    assert (summary.num_answered, summary.num_errors) == (len(LINES), len(BAD))
    errors = {}
    for result in results:
        error = result.get("error")
        if error is not None:
            errors.setdefault(result.get("custom_id", result["id"]), error["message"])
            if "custom_id" in result:
                assert result["response"]["status_code"] == 400
    assert errors.keys() == BAD.keys()
    for name, (_, message) in BAD.items():
        assert message in errors[name]

    def stable(results):
        """Return the results without times and line numbers."""
        kept = []
        for result in results:
            if "custom_id" not in result:
                kept.append(result)
            elif result["error"] is None:
                kept.append((result["custom_id"], result["response"]["body"]["choices"]))
        return sorted(map(json.dumps, kept))

    assert stable(good) == stable([result for result in results if result.get("error") is None])


def test_raw_prompts_are_not_changed(opened, answer):
    _, tokenizer, _ = opened
    (result,), _ = answer([LINES[0]], raw=True)
    assert result == {"id": "plain"} | alone(opened, tokenizer.encode("the quick brown fox"))
    (result,), _ = answer([{"id": "x", "prompt": ""}], raw=True)
    assert "the prompt is empty" in result["error"]["message"]


def test_read_ahead_is_bounded(opened, answer):
    """Lines are only read as fast as the engine takes requests, so a file may be of any length."""
    taken, most = 0, 0
    ahead = opened[0].max_batch_size * TAKEN_AHEAD

    def lines():
        nonlocal taken
        for index in range(3 * ahead):
            taken += 1
            yield BatchRecord(index, index + 1, "plain", ApiRequest({"max_new_tokens": 1 + index % 3}, prompt="fox"), index)

    class Counter:
        done = 0

        def write(self, line, line_hash):
            nonlocal most
            self.done += 1
            most = max(most, taken - self.done)

    counter = Counter()
    summary = run_batch(*opened, lines(), counter)
    assert summary.num_answered == counter.done == 3 * ahead
    assert ahead - 20 <= most <= ahead


def test_stopping_finishes_running_requests(opened):
    results, is_stopping = [], False

    class Writer:
        def write(self, line, line_hash):
            nonlocal is_stopping
            results.append(line)
            is_stopping = True

    records = [BatchRecord(index, index + 1, "plain", ApiRequest({}, prompt="fox")) for index in range(50)]
    summary = run_batch(*opened, iter(records), Writer(), should_stop=lambda: is_stopping)
    engine = opened[0]
    assert 1 <= summary.num_answered == len(results) <= engine.max_batch_size
    assert all(result["usage"]["completion_tokens"] == 6 for result in results)
    assert engine.is_idle and engine.stats.held_positions == 0


def test_completion_and_scoring(opened, answer):
    """`/v1/completions`: with `echo` and no new tokens the text is only scored."""
    _, tokenizer, _ = opened
    text = "the fox: 日本 e"

    def line(id: str, **body) -> dict:
        return {"custom_id": id, "method": "POST", "url": "/v1/completions", "body": {"prompt": text, **body}}

    lines = [
        line("continue"),
        line("score", echo=True, max_tokens=0, logprobs=2),
        line("both", echo=True, max_tokens=3, logprobs=1),
        line("none", max_tokens=0),
    ]
    named = by_id(answer(lines)[0])
    assert "max_new_tokens is 0; it must be at least 1" in named["none"]["error"]["message"]
    (choice,) = named["continue"]["response"]["body"]["choices"]
    prompt = tokenizer.encode(text)
    expected = alone(opened, prompt)
    assert (choice["text"], choice["logprobs"]) == (expected["text"], None)
    body = named["score"]["response"]["body"]
    (choice,), usage = body["choices"], body["usage"]
    assert (body["object"], choice["text"], choice["finish_reason"]) == ("text_completion", text, "length")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 0)
    columns = choice["logprobs"]
    assert [len(column) for column in columns.values()] == [len(prompt)] * 4
    assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
    assert all(value < 0 for value in columns["token_logprobs"][1:])
    for token, value, top in list(zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True))[
        1:
    ]:
        assert 1 <= len(top) <= 3 and top[token] >= value  # as OpenAI: the token itself may be one more; texts may be equal
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)
    (both,) = named["both"]["response"]["body"]["choices"]
    assert both["text"].startswith(text) and len(both["logprobs"]["tokens"]) == len(prompt) + 3
    assert both["logprobs"]["token_logprobs"][: len(prompt)] == pytest.approx(columns["token_logprobs"])


def test_progress_only_grows(answer, monkeypatch):
    monkeypatch.setattr(run, "REPORT_EVERY_S", 0)
    reports: list[BatchSummary] = []
    _, summary = answer([*LINES, "{"], report=lambda summary, stats: reports.append(dataclasses.replace(summary)))
    assert reports[-1] == summary
    for before, after in itertools.pairwise(reports):
        assert all(old <= new for old, new in zip(vars(before).values(), vars(after).values(), strict=True))
    assert len(reports) > summary.num_generated_tokens


def test_an_empty_file(answer):
    assert answer([""]) == ([], BatchSummary(seconds=pytest.approx(0, abs=1)))


def test_several_choices_of_one_record(answer):
    """Each is the answer to the record alone with the next seed; the usage counts the prompt once."""
    sampled = {"messages": MESSAGES, "max_tokens": 5, "temperature": 1.5, "seed": 2**63 - 2}
    seeds = [2**63 - 2, 2**63 - 1, -(2**63)]  # the largest is followed by the smallest
    singles = [{"custom_id": f"seed {n}", "body": sampled | {"seed": seed}} for n, seed in enumerate(seeds)]
    text = {"custom_id": "text", "url": "/v1/completions", "body": {"prompt": "the", "n": 2, "max_tokens": 2, "echo": True}}
    results, summary = answer([{"custom_id": "three", "body": sampled | {"n": 3, "logprobs": True}}, *singles, text])
    results = {name: result["response"]["body"] for name, result in by_id(results).items()}
    three, alone_bodies = results["three"], [results[f"seed {n}"] for n in range(3)]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in three["choices"]]
    assert contents == [body["choices"][0]["message"]["content"] for body in alone_bodies]
    assert len(set(contents)) == 3
    assert all(choice["logprobs"]["content"] for choice in three["choices"])
    counts = [body["usage"] for body in alone_bodies]
    assert three["usage"]["prompt_tokens"] == counts[0]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == sum(usage["completion_tokens"] for usage in counts)
    assert [choice["text"][:3] for choice in results["text"]["choices"]] == ["the", "the"]
    assert (summary.num_answered, summary.num_errors) == (5, 0)


def test_penalties_and_bias_of_a_line(answer, opened):
    _, tokenizer, _ = opened
    (fox,) = tokenizer.encode(" fox") if len(tokenizer.encode(" fox")) == 1 else tokenizer.encode("a")
    lines = [
        {"id": "plain", "prompt": "a"},
        {"id": "biased", "prompt": "a", "logit_bias": {str(fox): 100}, "max_new_tokens": 3, "logprobs": 0},
        {"id": "both", "prompt": "a", "logit_bias": {str(fox): 100}, "presence_penalty": 2, "top_k": -1},
        {"id": "outside", "prompt": "a", "logit_bias": {"344": 1}},
        {"id": "too much", "prompt": "a", "frequency_penalty": 2.5},
    ]
    results = by_id(answer(lines)[0])
    assert results["biased"]["text"] == tokenizer.decode([fox] * 3)
    assert results["both"]["text"] == tokenizer.decode([fox] * 6)  # 100 outweighs the penalty
    assert results["plain"]["text"] != results["both"]["text"]
    # The log-probabilities are those of the model, without the bias.
    assert all(entry["logprob"] < -0.01 for entry in results["biased"]["logprobs"])
    assert "logit_bias has token ids outside the vocabulary of 344" in results["outside"]["error"]["message"]
    assert "frequency_penalty is 2.5; it must be from -2 to 2" in results["too much"]["error"]["message"]
