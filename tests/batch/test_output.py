"""The output file: always complete lines, and a run that was interrupted at any byte can be resumed."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from qwen_dist.batch.journal import JOURNAL_ENTRY
from qwen_dist.batch.jsonl import read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.errors import UserError
from qwen_dist.storage.records import read_lines


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"id": n, "prompt": f"p{n}"}) for n in range(6)) + "\nno JSON\n")
    return list(read_records(path))


def result(record) -> dict:
    return {"id": record.id, "text": "日" * (1 + record.line_number % 3)} | ({"error": "e"} if record.id == 4 else {})


def write(path, records, **options) -> None:
    with OutputFile(path, **options) as output:
        for record in records:
            output.write(result(record), record.line_hash)


def ids(path) -> list:
    return [json.loads(line)["id"] for line in read_lines(path)]


def numbers(path, records, **options) -> list[int]:
    """Return the lines that a resumed run finds answered."""
    with OutputFile(path, **options) as output:
        return output.answered_lines(records).tolist()


def test_each_line_is_written_at_once(tmp_path):
    path = tmp_path / "out.jsonl"
    with OutputFile(path) as output:
        output.write({"text": "日\n\u2028"}, 1)
        assert path.read_bytes() == '{"text": "日\\n\u2028"}\n'.encode()
        output.write({"id": "\ud83d"}, 2)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [{"text": "日\n\u2028"}, {"id": "\ud83d"}]


def test_results_of_other_settings_are_not_changed(tmp_path, records):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(UserError, match="holds results already, and there is no journal"):
        OutputFile(path)
    assert (path.read_text(), [file.name for file in tmp_path.glob("out*")]) == ("old\n", ["out.jsonl"])
    with pytest.raises(UserError, match="no model"), OutputFile(path, overwrite=True):
        raise UserError("no model")
    assert path.read_text() == "old\n"
    write(path, records[:2], overwrite=True, settings="a")
    assert ids(path) == [0, 1]
    with pytest.raises(UserError, match="another checkpoint or other parameters"):
        OutputFile(path, settings="b")
    with OutputFile(path, settings="a") as output, pytest.raises(UserError, match="answers to 1 lines that are missing"):
        output.answered_lines(records[1:])
    with OutputFile(path, overwrite=True) as output:
        output.finish()  # finished without any record
    assert path.read_text() == ""


@pytest.mark.parametrize("name", ["", "missing/out.jsonl"])
def test_paths_that_cannot_be_written(tmp_path, name):
    with pytest.raises(UserError, match="cannot write the output"):
        OutputFile(tmp_path / name)


def test_interrupted_at_every_byte(tmp_path, records):
    """Either file may lose its end, by a kill or in the file system."""
    path, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    write(path, records)
    lines, entries = path.read_bytes(), journal.read_bytes()
    ends = np.cumsum([len(line) for line in lines.splitlines(keepends=True)])
    for cut in range(1, len(lines) + 1):
        for entry in (len(entries), len(entries) - 7, JOURNAL_ENTRY.itemsize * 3 + 5, JOURNAL_ENTRY.itemsize):
            path.write_bytes(lines[:cut])
            journal.write_bytes(entries[:entry])
            whole = min(int((ends <= cut).sum()), entry // JOURNAL_ENTRY.itemsize - 1)
            with OutputFile(path) as output:
                assert output.answered_lines(records).tolist() == list(range(1, whole + 1))
                for record in records[whole:]:
                    output.write(result(record), record.line_hash)
            assert (path.read_bytes(), journal.read_bytes()) == (lines, entries)


@pytest.mark.parametrize(("field", "change"), [("result_hash", 1), ("size", 1), ("size", 2**31)])
def test_results_that_a_damaged_journal_does_not_name_are_kept(tmp_path, records, capfd, field, change):
    path, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    write(path, records)
    lines = path.read_bytes().splitlines(keepends=True)
    entries = np.frombuffer(journal.read_bytes(), JOURNAL_ENTRY).copy()
    entries[3][field] ^= change
    for number in (1, 2):
        path.write_bytes(b"".join(lines))
        journal.write_bytes(entries.tobytes())
        assert numbers(path, records) == [1, 2]
        kept = tmp_path / ("out.jsonl.discarded" if number == 1 else "out.jsonl.discarded-2")
        assert path.read_bytes() + kept.read_bytes() == b"".join(lines)
        assert f"{journal} has no entry for the last 5 results of {path}" in capfd.readouterr().err
    assert numbers(path, records) == [1, 2] and len(list(tmp_path.glob("*discarded*"))) == 2
    assert capfd.readouterr().err == ""


def test_retry_errors(tmp_path, records):
    path = tmp_path / "out.jsonl"
    write(path, records)
    assert numbers(path, records) == [1, 2, 3, 4, 5, 6, 7]
    assert numbers(path, records, retry_errors=True) == [1, 2, 3, 4, 6, 7]
    assert ids(path) == [0, 1, 2, 3, 5, "line-7"]
    write(path, [records[4]])
    assert ids(path) == [0, 1, 2, 3, 5, "line-7", 4]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_keep_order(tmp_path, records, name):
    path = tmp_path / name
    with OutputFile(path) as output:
        for record in reversed(records[2:]):
            output.write(result(record), record.line_hash)
    with OutputFile(path) as output:
        assert output.answered_lines(records).tolist() == [3, 4, 5, 6, 7]
        for record in records[:2]:
            output.write(result(record), record.line_hash)
        output.finish(records)
    assert [json.loads(line) for line in read_lines(path)] == [result(record) for record in records]
    assert sorted(file.name for file in tmp_path.glob("out*")) == [name, f"{name}.journal"]
    assert numbers(path, records, retry_errors=True) == [1, 2, 3, 4, 6, 7]


def test_killed_while_the_files_are_reordered(tmp_path, records):
    path, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    write(path, records)
    lines, before = path.read_bytes().splitlines(keepends=True), journal.read_bytes()
    path.write_bytes(b"".join(lines[index] for index in (6, 2, 5, 0)))
    assert numbers(path, records) == [1, 3, 6, 7]
    assert np.frombuffer(journal.read_bytes(), JOURNAL_ENTRY).tolist()[1:] == [
        np.frombuffer(before, JOURNAL_ENTRY).tolist()[1:][index] for index in (6, 2, 5, 0)
    ]


def test_every_input_format(tmp_path, records):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    content = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(content))
    for name in ("in.jsonl.gz", "in.jsonl.zst"):
        assert list(read_records(tmp_path / name)) == records
    rows = [
        {"id": 0, "prompt": "p0", "seed": None, "messages": None},
        {"id": 1, "prompt": None, "messages": [{"role": "user", "content": "x"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    one, other = read_records(tmp_path / "in.parquet")
    assert (one.id, one.request.prompt, one.request.params, other.request.messages) == (0, "p0", {}, rows[1]["messages"])
    (tmp_path / "torn.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(UserError, match="is damaged after line"):
        list(read_records(tmp_path / "torn.gz"))


def test_equal_lines_have_different_hashes(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n' * 3 + '{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "x"}\n')
    first, second = (list(read_records(path)) for _ in range(2))
    assert len({record.line_hash for record in first}) == 5
    assert [record.line_hash for record in first] == [record.line_hash for record in second]


def test_full_device():
    with OutputFile("/dev/full") as output, pytest.raises(UserError, match="No space left on device; the 0 results so far"):
        output.write({"a": 1}, 1)


FILE_LIMIT = """
import resource, sys
from qwen_dist.batch.output import OutputFile
from qwen_dist.errors import UserError
from qwen_dist.storage.records import read_lines

output = OutputFile(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    for number in range(100):
        output.write({"id": number, "text": "x" * 20}, number)
except UserError as error:
    print(error)
output.close()
"""


def test_file_size_limit_keeps_complete_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    # Python ignores SIGXFSZ, so the write at the limit is partial and the next one fails, as on a full disk.
    done = subprocess.run([sys.executable, "-c", FILE_LIMIT, path], capture_output=True, text=True, check=True)
    assert "File too large; the 2 results so far are complete: free some disk space" in done.stdout
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [0, 1]
    assert path.read_text().endswith("}\n")
