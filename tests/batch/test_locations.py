"""Inputs and outputs in every format, local and remote; what a resumed run finds there."""

import json

import pyarrow.parquet
import pytest

from qwen_dist.batch.jsonl import read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.errors import UserError
from qwen_dist.storage.line_writer import exists, write_lines
from qwen_dist.storage.records import read_lines

RECORDS = [{"id": number, "prompt": f"größe {number}"} for number in range(7)]
OPENAI_RESULT = {"id": "batch_req_1", "custom_id": "c", "response": {"status_code": 200, "body": {"x": [1]}}, "error": None}


def result(number: int) -> dict:
    if number == 3:
        return {"id": number, "error": {"code": "invalid_request", "message": "no", "line": 4}}
    usage = {"prompt_tokens": number, "completion_tokens": 2}
    return {"id": number, "text": f"é{number}", "finish_reason": "stop", "usage": usage, "logprobs": [{"token": "é"}]}


def write(output: str, records, numbers) -> int:
    """Write the results of some records; return how many existed before."""
    with OutputFile(output) as writer:
        done = writer.answered_lines(records)
        for number in numbers:
            writer.write(result(number), records[number].line_hash)
        if len(done) + len(numbers) == len(records):
            writer.finish(records)
        return writer.num_before


@pytest.fixture
def records(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return list(read_records(tmp_path / "in.jsonl"))


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> str:
    """The URL of a store; the working directory is another one."""
    for name in ("bucket", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return f"file://{tmp_path}/bucket"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_an_output_written_in_two_runs(bucket, records, tmp_path, name, is_remote):
    output = f"{bucket}/{name}" if is_remote else f"{tmp_path}/{name}"
    assert write(output, records, [5, 0, 3]) == 0
    assert not is_remote or not exists(output)
    assert write(output, records, [1, 6, 2, 4]) == 3
    found = [json.loads(line) for line in read_lines(output)]
    if name.endswith("parquet"):
        assert [line.pop("id") for line in found] == [str(number) for number in range(7)]
        found = [
            {"id": number, **line} | ({"logprobs": json.loads(line["logprobs"])} if "text" in line else {})
            for number, line in enumerate(found)
        ]
    assert found == [result(number) for number in range(7)]
    assert write(output, records, []) == 7  # finished, and nothing changes
    assert len(list(read_lines(output))) == 7
    with pytest.raises(UserError, match="of another checkpoint or other parameters"):
        OutputFile(output, settings="others")


def test_existing_remote_results_are_not_changed(bucket, records, tmp_path):
    (tmp_path / "bucket" / "out.jsonl").write_text("old\n")
    with pytest.raises(UserError, match="holds results already"):
        write(f"{bucket}/out.jsonl", records, [0])
    assert (tmp_path / "bucket" / "out.jsonl").read_text() == "old\n" and not list((tmp_path / "here").iterdir())


def test_openai_results_in_parquet(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    (record,) = read_records(tmp_path / "in.jsonl")
    with OutputFile(str(tmp_path / "out.parquet")) as writer:
        writer.write(OPENAI_RESULT, record.line_hash)
        writer.finish()
    (row,) = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert json.loads(row["response"]) == OPENAI_RESULT["response"]
    assert (row["custom_id"], row["error"], row["text"]) == ("c", None, None)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.parquet"])
def test_remote_inputs(bucket, tmp_path, name):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "bucket" / name)
    else:
        write_lines(str(tmp_path / "bucket" / name), lines)
    assert [(record.id, record.request.prompt) for record in read_records(f"{bucket}/{name}")] == [
        (record["id"], record["prompt"]) for record in RECORDS
    ]


@pytest.mark.parametrize(("url", "message"), [("{}/none.jsonl", "does not exist"), ("bad://x/y", "Unable to recognise")])
def test_missing_remote_inputs(bucket, url, message):
    with pytest.raises(UserError, match=message):
        list(read_records(url.format(bucket)))
