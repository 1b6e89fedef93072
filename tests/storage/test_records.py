"""Files of records: every format and location, for batches and training; damaged files and very long lines."""

import codecs
import gzip
import json
import os
import resource
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from web_server import Handler, serve

from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord, read_records
from qwen_dist.errors import UsageError, UserError
from qwen_dist.storage.line_reader import UnreadableLine
from qwen_dist.storage.records import RECORD_SUFFIXES, find_files, read_lines, read_rows
from qwen_dist.train.records import BadTrainRecord, TrainRecord, find_data_files, read_train_records

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
    assert [type(row) for _, row in read_rows(str(path), len(LINES[0]))] == [bytes, UnreadableLine] * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_that_decompresses_to_more_than_the_limit_is_not_kept(tmp_path, suffix):
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(200 * 2**20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((_, line),) = read_rows(str(path), 10**6)
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
    rows = [row for _, row in read_rows(str(path), 1000)]
    assert [isinstance(row, UnreadableLine) for row in rows] == [False, True, True, False]
    assert rows[3] == {"prompt": "c", "messages": chats[3]}
    assert [json.loads(line)["messages"] for line in read_lines(path)] == chats
    records = list(read_train_records([str(path)], raw=False, max_line_bytes=1000))
    assert [(type(record), record.location.line) for record in records[1:3]] == [(BadTrainRecord, 2), (BadTrainRecord, 3)]
    assert "the row has more than 1000 bytes" in records[1].detail


def test_many_rows_with_one_long_value_are_not_kept_together(tmp_path):
    path = write_table(tmp_path / "in.parquet", prompt=["x" * 2**20] * 200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(isinstance(row, dict) for _, row in read_rows(str(path), 4 * 2**20)) == 200
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


# --- the same files for a batch and for training, wherever they are ---

CHATS = [[{"role": "user", "content": f"größe {n}"}, {"role": "assistant", "content": f"{n} cm"}] for n in range(4)]
CONTENT = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in CHATS).encode()


def chats_read(*patterns) -> tuple[list, list]:
    """The chats that a batch reads from `--input`, and those that training reads from `--data`."""
    files = [find_files([str(pattern)], RECORD_SUFFIXES, "--input") for pattern in patterns]
    batch = [record.request.messages for record in read_records([name for names in files for name in names])]
    train = read_train_records(find_data_files([str(pattern) for pattern in patterns]), raw=False)
    return batch, [list(record.chat.messages) for record in train]


@pytest.fixture
def written(tmp_path):
    """A function name -> path of a file with `CHATS`, in the format of the name."""

    def written(name, chats=slice(None)):
        path, suffixes = tmp_path / name, (tmp_path / name).suffixes
        path.parent.mkdir(exist_ok=True)
        if ".parquet" in suffixes:
            pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS[chats]}), path)
            return path
        content = b"".join(CONTENT.splitlines(keepends=True)[chats])
        if ".json" in suffixes:
            content = json.dumps([{"messages": chat} for chat in CHATS[chats]]).encode()
        path.write_bytes(COMPRESS.get(suffixes[-1], bytes)(codecs.BOM_UTF8 + content))
        return path

    return written


NAMES = ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.parquet", "in.json", "in.json.gz", "in.json.zst"]


@pytest.fixture
def web(tmp_path):
    with serve(tmp_path) as server:
        server.serves_text_ranges = True
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_every_format_and_location(written, web, tmp_path, name):
    path = written(name)
    for location in (path, f"{web.url}/{name}", f"{web.url}/{name}?token=a.b", f"file://{path}"):
        assert chats_read(location) == (CHATS, CHATS), location


def test_patterns_and_directories(written, tmp_path):
    written("data/b.jsonl.gz", slice(2, 3)), written("data/a.jsonl", slice(0, 2)), written("data/c.parquet", slice(3, 4))
    (tmp_path / "data" / "notes.md").write_text("no records")
    for place in (tmp_path / "data", f"{tmp_path}/data/", f"{tmp_path}/**/[abc].*", f"file://{tmp_path}/data/"):
        assert chats_read(place) == (CHATS, CHATS), place
    assert chats_read(f"file://{tmp_path}/data/*.parquet") == (CHATS[3:], CHATS[3:])
    assert len(find_data_files([f"{tmp_path}/data/a.jsonl"] * 2)) == 2  # given twice, read twice
    records = list(read_records(find_files([f"{tmp_path}/data"], RECORD_SUFFIXES, "--input")))
    assert [(record.id, record.line_number) for record in records] == [(f"line-{n}", n) for n in (1, 2, 3, 4)]


def test_a_data_set_on_the_hub(written, tmp_path):
    """In a process of its own, as the hub's library reads its environment when it is imported."""
    written("in.jsonl.gz")
    listing = {"siblings": [], "id": "org/name", "sha": "1" * 40}
    files = [{"type": "file", "path": f"more/{name}", "size": 1, "oid": "1"} for name in ("in.jsonl.gz", "read.me")]

    class Hub(Handler):
        def do_GET(self):
            if "/resolve/" in self.path:
                self.path = self.path.removeprefix("/datasets/org/name/resolve/v1/more")
                return super().do_GET()
            return self.answer(200, json.dumps(files if "/tree/" in self.path else listing).encode())

    with serve(tmp_path) as hub:
        hub.RequestHandlerClass, hub.serves_text_ranges = Hub, True
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        urls = [f"hf://datasets/org/name@v1/more/{name}" for name in ("in.jsonl.gz", "*.gz", "")]
        command, variables = [sys.executable, "-c", HUB_SCRIPT, *urls], variables | {"HF_ENDPOINT": hub.url}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == CHATS * 3


HUB_SCRIPT = """
import json, sys
from qwen_dist.train.records import find_data_files, read_train_records

records = read_train_records(find_data_files(sys.argv[1:]), raw=False)
print(json.dumps([list(record.chat.messages) for record in records]))
"""


def test_the_same_limits_on_both_sides(written, tmp_path):
    for name in ("cut.jsonl.gz", "cut.jsonl.zst"):
        path = written(name)
        path.write_bytes(path.read_bytes()[:-3])
        for read in (lambda: list(read_records(path)), lambda: list(read_train_records([str(path)], raw=False))):  # noqa: B023
            with pytest.raises(UserError, match=rf"the input {path} is damaged after line \d: "):
                read()
    long = written("long.jsonl")
    long.write_bytes(CONTENT + b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "\xff"}\n')
    *_, batch, other = read_records(long, 1000)
    *_, train, another = read_train_records([str(long)], raw=False, max_line_bytes=1000)
    assert (batch.message, batch.line_number) == (train.detail, train.location.line)
    assert (other.message, other.line_number) == (another.detail, another.location.line)
    assert batch.message == "the line has more than 1000 bytes, which is max_line_size"
    assert other.message == "the line is not JSON: byte 10 is not UTF-8"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    for find in (find_data_files, lambda names: find_files(names, RECORD_SUFFIXES, "--input")):
        with pytest.raises(UsageError, match=r"in\.jsonl is not a regular file"):
            find([f"{tmp_path}/in.jsonl"])
    with pytest.raises(UserError, match="it is not a regular file"):
        read_records(tmp_path / "in.jsonl")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UsageError) as error:
        find_files([f"{tmp_path}/none", f"{tmp_path}/*.jsonl", str(tmp_path)], RECORD_SUFFIXES, "--input")
    assert str(error.value) == (
        f"--input cannot be read: there is no file {tmp_path}/none; no file matches {tmp_path}/*.jsonl; "
        f"no file matches {tmp_path}"
    )
    with pytest.raises(UserError, match="is not a file on the hub: give hf://datasets/"):
        list(read_records("hf://org/name/in.jsonl"))


def test_compressed_texts(tmp_path):
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("größe\n\nx".encode("utf-8-sig")))
    (record,) = read_train_records(find_data_files([str(tmp_path)]), raw=False)
    assert record.text == "größe\n\nx"
    with pytest.raises(UserError, match=r"book\.txt\.gz has more than 5 bytes"):
        list(read_train_records([f"{tmp_path}/book.txt.gz"], raw=False, max_line_bytes=5))


def test_bytes_in_a_table_are_no_text(tmp_path):
    path = write_table(tmp_path / "in.parquet", prompt=[b"abc"])
    (record,) = read_records(path)
    assert isinstance(record, InvalidRecord) and record.message.startswith("prompt must be a string; got b'abc'")
