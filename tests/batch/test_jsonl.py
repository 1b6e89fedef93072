"""Input and output lines: every format and every kind of invalid line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord, error_line, read_records, result_line
from qwen_dist.errors import UserError
from qwen_dist.openai_api import ApiRequest, Choice

MESSAGES = [{"role": "user", "content": "Hi 😀"}]


def read(tmp_path: Path, *lines: object) -> list[BatchRecord | InvalidRecord]:
    """Return the records of a file with these lines: bytes unchanged, other values as JSON."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return list(read_records(path))


def read_one(tmp_path: Path, line: object) -> BatchRecord | InvalidRecord:
    (record,) = read(tmp_path, line)
    return record


def openai(custom_id: str = "c", **body: object) -> dict:
    body = {"model": "qwen", "messages": MESSAGES, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_the_three_kinds_of_line(tmp_path):
    assert read(tmp_path, {"id": "a", "prompt": "Hi"}, {"id": 7, "messages": MESSAGES}, openai("c")) == [
        BatchRecord("a", 1, "plain", ApiRequest({}, prompt="Hi")),
        BatchRecord(7, 2, "plain", ApiRequest({}, messages=MESSAGES)),
        BatchRecord("c", 3, "openai", ApiRequest({}, messages=MESSAGES, model="qwen")),
    ]


def test_bom_blank_lines_crlf_and_missing_ids(tmp_path):
    records = read(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"  \r", b'{"prompt"', b'{"prompt": "\xe6\x97\xa5"}')
    assert records[0] == BatchRecord("line-1", 1, "plain", ApiRequest({}, prompt="a"))
    assert (records[1].id, records[1].line_number) == ("line-4", 4)
    assert records[2] == BatchRecord("line-5", 5, "plain", ApiRequest({}, prompt="日"))


def test_plain_parameters(tmp_path):
    params = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": -3,
        "max_new_tokens": 5,
        "logprobs": 0,
    }
    record = read_one(tmp_path, {"prompt": "x", "stop": "\n", **params})
    assert record.request.params == {**params, "stop": ["\n"]}
    assert read_one(tmp_path, {"prompt": "x", "stop": ["a", "b"], "seed": None}).request.params == {"stop": ["a", "b"]}


def test_openai_parameters(tmp_path):
    body = {"max_tokens": 5, "max_completion_tokens": 5, "temperature": 0.7, "stop": "x", "seed": 1, "top_k": 3}
    expected = {"max_new_tokens": 5, "temperature": 0.7, "stop": ["x"], "seed": 1, "top_k": 3}
    assert read_one(tmp_path, openai(**body)).request.params == expected
    assert read_one(tmp_path, openai(logprobs=True)).request.params == {"logprobs": 0}
    assert read_one(tmp_path, openai(logprobs=True, top_logprobs=4)).request.params == {"logprobs": 4}
    assert read_one(tmp_path, openai(logprobs=False, top_logprobs=None)).request.params == {}


def test_openai_parameters_without_effect_are_accepted(tmp_path):
    harmless = {"user": "u", "metadata": {"k": "v"}, "store": True, "service_tier": "auto"}
    neutral = {"stream": False, "n": None, "best_of": 1, "tools": None}
    assert read_one(tmp_path, openai(**harmless, **neutral)).request.params == {}
    penalties = {"frequency_penalty": 0.5, "presence_penalty": -1, "min_tokens": 2, "top_k": -1}
    record = read_one(tmp_path, openai(**penalties, n=3, logit_bias={"5": 100, "12": -0.5}))
    assert record.request.num_choices == 3
    assert record.request.params.pop("min_new_tokens") == penalties.pop("min_tokens")
    assert record.request.params == penalties | {"logit_bias": ((5, 100.0), (12, -0.5))}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a", "prompt": ', r"not JSON: .* \(column 22\)"),
        (b'{"id": "a", "prompt": "\xff"}', "byte 23 is not UTF-8"),
        (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "temperature": 1e999}', "the number 1e999 is too large"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "a number has 401 digits: 10000"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}", "seed must be a whole number; got 10000"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "a number has 5000 digits"),
        (b"[" * 100_000, "nested deeper than"),
        (b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100"),
        ({"prompt": "a", "x" * 10**6: 1}, "unknown xxx"),
        (["prompt"], "must be a JSON object"),
        ({"id": "a"}, "either prompt or messages"),
        ({"prompt": "a", "messages": MESSAGES}, "either prompt or messages"),
        ({"prompt": 3}, "prompt must be a string; got 3"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": ["hi"]}, "messages must be a non-empty list"),
        ({"id": True, "prompt": "a"}, "id must be a non-empty string or a whole number; got True"),
        ({"id": "", "prompt": "a"}, "id must be"),
        ({"prompt": "a", "temprature": 1}, "unknown temprature; allowed are id, prompt, messages, tools, chat_temp"),
        ({"prompt": "a", "top_k": 1.5, "seed": "x"}, "top_k must be a whole number; got 1.5; seed must be"),
        ({"prompt": "a", "temperature": True}, "temperature must be a number; got True"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop must be a non-empty string or a list"),
        ({"prompt": "a", "logprobs": True}, "logprobs must be a whole number"),
        ({"custom_id": "c"}, 'body must be an object with "messages"; got None'),
        (
            openai() | {"method": "GET", "url": "/v1/embeddings"},
            "method must be POST; got 'GET'; url must be /v1/chat/completions or /v1/completions",
        ),
        (openai() | {"priority": 1}, "unknown priority; allowed are custom_id"),
        (openai(messages="hi"), "messages must be"),
        (openai(model=3), "model must be a string; got 3"),
        (openai(best_of=2, stream=True), "leave out: best_of, stream"),
        (openai(n=0), "n must be a whole number from 1 to 128; got 0"),
        (openai(n=True), "n must be a whole number"),
        (openai(n=129), "n must be a whole number"),
        (openai(frequency_penalty="high"), "frequency_penalty must be a number; got 'high'"),
        (openai(logit_bias={"five": 1}), "logit_bias must be an object of token ids and biases"),
        (openai(logit_bias={"5": "1"}), "logit_bias must be an object"),
        (openai(logit_bias={"05": 1}), "logit_bias must be an object"),
        (openai(logit_bias={"1" * 5000: 1}), "logit_bias must be an object"),
        (openai(logit_bias=[5]), "logit_bias must be an object"),
        (openai(temprature=1), "leave out: temprature"),
        (openai(max_tokens=1, max_completion_tokens=2), "max_completion_tokens is 2, but .* says 1"),
        (openai(max_tokens="1"), "max_tokens must be a whole number; got '1'"),
        (openai(max_new_tokens=1), "leave out: max_new_tokens"),
        (openai(logprobs=3), "logprobs must be true or false"),
        (openai(top_logprobs=3), "top_logprobs needs logprobs: true"),
        (openai(logprobs=True, top_logprobs=-1), "top_logprobs must be a whole number"),
    ],
)
def test_invalid_lines(tmp_path, line, message):
    bad, good = read(tmp_path, line, {"id": "next", "prompt": "x"})
    assert isinstance(bad, InvalidRecord)
    assert re.search(message, bad.message), bad.message
    assert len(bad.message) < 400
    assert good == BatchRecord("next", 2, "plain", ApiRequest({}, prompt="x"))


def test_an_invalid_record_keeps_its_id_and_format(tmp_path):
    bad = read(tmp_path, {"id": "a", "prompt": 3}, openai("c", n=0), b"{", {"id": [], "prompt": "x"})
    assert [(record.id, record.line_number, record.format) for record in bad] == [
        ("a", 1, "plain"),
        ("c", 2, "openai"),
        ("line-3", 3, "openai"),  # the format of the line before
        ("line-4", 4, "plain"),
    ]


def test_duplicate_ids(tmp_path):
    first, second, other, implied = read(
        tmp_path,
        {"id": "line-4", "prompt": "x"},
        {"id": "line-4", "prompt": "y"},
        {"id": 1, "prompt": "x"},
        {"prompt": "z"},
    )
    assert isinstance(first, BatchRecord) and isinstance(other, BatchRecord)
    assert isinstance(second, InvalidRecord) and "'line-4' is already that of an earlier line" in second.message
    assert isinstance(implied, InvalidRecord) and implied.id == "line-4"


@given(st.binary(max_size=60))
def test_any_bytes_can_be_read(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(line + b'\n{"id": "last", "prompt": "x"}')
    assert list(read_records(path))[-1].id == "last"


def test_lines_are_read_lazily(tmp_path):
    with open(tmp_path / "in.jsonl", "wb") as file:
        file.write(b'{"prompt": "x"}\n')
        file.truncate(2**40)
    assert next(read_records(tmp_path / "in.jsonl")).request.prompt == "x"


def test_a_missing_input_is_an_error_at_once(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the input .*nothing: No such file"):
        read_records(tmp_path / "nothing")


def test_plain_result_lines():
    record = BatchRecord(7, 3, "plain", ApiRequest({}, prompt="x"))
    usage = {"prompt_tokens": 4, "completion_tokens": 2}
    expected = {"id": 7, "text": "Hi", "finish_reason": "stop", "usage": usage}
    assert result_line(record, [Choice("Hi", "stop", 2)], 4) == expected
    logprobs = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}]
    assert result_line(record, [Choice("Hi", "stop", 2, logprobs)], 4) == expected | {"logprobs": logprobs}
    assert error_line(record, "too long", "prompt_too_long") == {
        "id": 7,
        "error": {"code": "prompt_too_long", "message": "too long", "line": 3},
    }


def test_openai_result_lines():
    record = BatchRecord("c", 3, "openai", ApiRequest({}, messages=MESSAGES, model="qwen"))
    logprobs = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}]
    line = result_line(record, [Choice("Hi", "length", 2, logprobs)], 4)
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("c", None, 200)
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "qwen")
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert body["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]["content"]) == (0, "length", logprobs)

    failed = error_line(InvalidRecord("c", 3, "openai", "no"), "no")
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("c", 400)
    assert failed["error"] == {"code": "invalid_request", "message": "no", "line": 3}
    assert failed["response"]["body"]["error"]["message"] == "no"
    assert line["id"] == failed["id"] == "batch_req_3"


def test_importing_the_records_imports_no_jax():
    code = "import sys, qwen_dist.batch.output, qwen_dist.tokenizer as _; sys.exit(bool({'jax', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
