"""Damaged files and very long lines: one sentence with the file and the line, within a bound of memory."""

import gzip
import json
import resource
import socket

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from qwen_dist.batch.formats import read_bounded_lines, read_lines
from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord, read_records
from qwen_dist.batch.line_reader import UnreadableLine
from qwen_dist.batch.metrics import metrics_server
from qwen_dist.errors import UserError
from qwen_dist.train.records import BadTrainRecord, TrainRecord, read_train_records

LINES = [json.dumps({"id": number, "prompt": f"prompt {number}"}).encode() + b"\n" for number in range(60)]
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def read_until_error(path) -> tuple[list[bytes], str]:
    """Return the lines and the message of the error that ends the file; an empty text for none."""
    found = []
    try:
        for line in read_lines(path):
            found.append(line)
    except UserError as error:
        return found, str(error)
    return found, ""


@pytest.fixture(params=COMPRESS)
def members(request, tmp_path):
    """A path and three compressed frames that make up its content."""
    frames = [COMPRESS[request.param](b"".join(LINES[start : start + 20])) for start in (0, 20, 40)]
    return tmp_path / f"in.jsonl{request.param}", frames


def test_several_frames_are_one_file(members):
    path, frames = members
    path.write_bytes(b"".join(frames))
    assert read_until_error(path) == (LINES, "")


def test_a_file_cut_anywhere_is_damaged(members):
    path, frames = members
    whole, ends = b"".join(frames), {len(frames[0]), len(frames[0] + frames[1])}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found, message = read_until_error(path)
        assert found == LINES[: len(found)]
        if length in ends:  # such a file is a whole one
            assert not message and len(found) in (20, 40)
        elif length == 0:
            assert "it is empty" in message
        else:
            assert f"{path} is damaged after line {len(found)}: " in message, (length, message)


def test_changed_bytes_are_noticed(members):
    path, frames = members
    whole = b"".join(frames)
    for position in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        found, message = read_until_error(path)
        assert len(message.splitlines()) <= 1 and len(message) < 400
        assert message or found == LINES or position < 16  # the header of a frame has bytes without a meaning


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_long_line_is_refused_and_the_next_one_read(tmp_path, suffix, end):
    path = tmp_path / f"in.jsonl{suffix}"
    content = LINES[0] + b'{"prompt": "' + b"x" * 5000 + b'"}\n' + LINES[1] + b"y" * 5000 + end
    path.write_bytes(COMPRESS.get(suffix, bytes)(content))
    first, long, second, last = read_records(path, 1000)
    assert isinstance(first, BatchRecord) and isinstance(second, BatchRecord)
    assert isinstance(long, InvalidRecord) and isinstance(last, InvalidRecord)
    assert (long.id, long.line_number, last.line_number) == ("line-2", 2, 4)
    assert long.message == "the line has more than 1000 bytes, which is max_line_size"
    # The hash is that of the whole line, so that a resumed run with another limit finds it.
    assert [record.line_hash for record in read_records(path)] == [
        record.line_hash for record in (first, long, second, last)
    ]
    assert [type(line) for line in read_bounded_lines(path, len(LINES[0]))] == [
        bytes,
        UnreadableLine,
        bytes,
        UnreadableLine,
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_that_decompresses_to_more_than_the_limit_is_not_kept(tmp_path, suffix):
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(200 * 2**20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = read_bounded_lines(path, 10**6)
    assert isinstance(line, UnreadableLine)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def write_table(path, **columns):
    # A large dictionary, so that repeated values are stored once.
    pyarrow.parquet.write_table(pyarrow.table(columns), path, dictionary_pagesize_limit=2**30)
    return path


def test_long_rows(tmp_path):
    long = "x" * 5000
    chats = [[{"role": "user", "content": text}] * 3 for text in ("a", "b", long[:400], "c")]
    path = write_table(tmp_path / "in.parquet", prompt=["a", long, None, "c"], messages=chats)
    lines = list(read_bounded_lines(path, 1000))
    assert [isinstance(line, UnreadableLine) for line in lines] == [False, True, True, False]
    assert json.loads(lines[3]) == {"prompt": "c", "messages": chats[3]}
    assert [json.loads(line)["messages"] for line in read_lines(path)] == chats
    records = list(read_train_records([str(path)], raw=False, max_line_bytes=1000))
    assert [(type(record), record.location.line) for record in records[1:3]] == [(BadTrainRecord, 2), (BadTrainRecord, 3)]
    assert "the row has more than 1000 bytes" in records[1].detail


def test_many_rows_with_one_long_value_are_not_kept_together(tmp_path):
    path = write_table(tmp_path / "in.parquet", prompt=["x" * 2**20] * 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(isinstance(line, bytes) for line in read_bounded_lines(path, 4 * 2**20)) == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("kind", [pyarrow.date64(), pyarrow.timestamp("us"), pyarrow.duration("s")])
def test_a_value_that_python_cannot_hold_is_a_bad_row(tmp_path, kind):
    far = pyarrow.array([0, 2**61 - 2**61 % 86_400_000, 0], pyarrow.int64()).cast(kind)
    path = write_table(tmp_path / "in.parquet", text=["a", "b", "c"], when=far)
    first, bad, last = read_records(path)
    assert (first.line_number, last.line_number) == (1, 3)
    assert isinstance(bad, InvalidRecord) and bad.message.startswith("the row cannot be read: ")
    good, bad, _ = read_train_records([str(path)], raw=False)
    assert isinstance(good, TrainRecord) and bad.location.line == 2


def test_damaged_parquet_files(tmp_path):
    path = write_table(tmp_path / "in.parquet", prompt=[f"prompt {number}" for number in range(3000)])
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 3, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:place] + b"\xff" * 40 + whole[place + 40 :] for place in range(4, len(whole) - 60, 1500)]
    for content in damaged:
        path.write_bytes(content)
        found, message = read_until_error(path)
        assert message.startswith(("cannot read the input ", "the input ")) and str(path) in message, found
        assert len(message.splitlines()) == 1 and len(message) < 500
        with pytest.raises(UserError):
            list(read_train_records([str(path)], raw=True))


def test_metrics_are_served_to_this_machine_unless_another_address_is_given():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with metrics_server(port, "127.0.0.1"), socket.socket() as other:
        other.bind(("127.0.0.2", port))  # in use if the server listened on all addresses
        with pytest.raises(UserError, match=rf"cannot serve metrics on 127.0.0.1 port {port}: Address already in use"):
            metrics_server(port, "127.0.0.1").__enter__()
    with pytest.raises(UserError, match=r"cannot serve metrics on nowhere\.invalid port"):
        metrics_server(port, "nowhere.invalid").__enter__()
