"""Opening a folder: the index is checked before any file, all problems are reported, later changes are noticed."""

import os
import threading

import numpy as np
import pytest

from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError
from qwen_dist.storage.files import LocalFile, LocalFolder

A, B = np.ones((2, 2), "float32"), np.zeros(3, "float32")
INDEX = "model.safetensors.index.json"


def test_one_file_and_many(write_checkpoint, tmp_path):
    one = write_checkpoint({"model.safetensors": {"a": A, "b": B}}, folder=tmp_path / "one")
    many = write_checkpoint({"z.safetensors": {"a": A}, "y.safetensors": {"b": B}}, folder=tmp_path / "many")
    for folder in (one, many):
        checkpoint = open_checkpoint(folder)
        assert sorted(checkpoint.tensors) == ["a", "b"] and checkpoint.nbytes == 28 and not checkpoint.warnings
    assert open_checkpoint(many).tensors["b"].file == "y.safetensors"


@pytest.mark.fault
@pytest.mark.parametrize(
    "value",
    ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "x\0.safetensors",
     "x.bin", "", ".", 7, None, "http://host/x.safetensors", "x.safetensors?y=.safetensors", "sub/x.safetensors"],
)  # fmt: skip
def test_index_may_name_only_plain_files(write_checkpoint, monkeypatch, value):
    folder = write_checkpoint({"model.safetensors": {"a": A}}, index={"weight_map": {"a": value}})
    monkeypatch.setattr(LocalFolder, "open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(CheckpointError, match="weight_map may only name"):
        open_checkpoint(folder)


@pytest.mark.fault
@pytest.mark.parametrize("value", ["x" * 300 + ".safetensors", "\x1b[2J.safetensors", "é" * 130 + ".safetensors"])
def test_index_may_name_only_files_that_can_exist(write_checkpoint, value):
    folder = write_checkpoint({"model.safetensors": {"a": A}}, index={"weight_map": {"a": value}})
    with pytest.raises(CheckpointError, match="weight_map may only name") as error:
        open_checkpoint(folder)
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value)


@pytest.mark.fault
def test_an_index_of_many_missing_files_is_one_short_message(write_checkpoint):
    names = {f"t{number}": f"{number}.safetensors" for number in range(100_000)}
    folder = write_checkpoint({"model.safetensors": {"a": A}}, index={"weight_map": names})
    with pytest.raises(CheckpointError, match=r"99744 more files were not opened") as error:
        open_checkpoint(folder)
    assert len(str(error.value).splitlines()) < 25


@pytest.mark.fault
@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        ("{}".encode("utf-16"), "byte 0 is not UTF-8"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number has 5001 digits"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_json_files_are_read_strictly(write_checkpoint, name, raw, message):
    folder = write_checkpoint({"model.safetensors": {"a": A}})
    (folder / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name} is not JSON: .*{message}"):
        open_checkpoint(folder)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors"])
@pytest.mark.parametrize("kind", ["named pipe", "directory", "device", "loop", "too large"])
def test_only_regular_files_of_bounded_size_are_read(write_checkpoint, name, kind):
    folder = write_checkpoint({"model.safetensors": {"a": A}})
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
        os.truncate(path, 2**40)  # sparse
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert name in str(error.value) and len(str(error.value)) < 600


@pytest.mark.fault
def test_small_files_may_not_be_links_out_of_the_checkpoint(write_checkpoint, tmp_path):
    (tmp_path / "id_rsa").write_text("private")
    folder = LocalFolder(write_checkpoint({"model.safetensors": {"a": A}}))
    (folder.root / "LICENSE").symlink_to("../id_rsa")
    (folder.root / "NOTICE").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        folder.read("LICENSE")
    assert folder.read("NOTICE") == folder.read("config.json") and folder.read("README.md") is None


@pytest.mark.fault
@pytest.mark.parametrize(
    "raw", [b"", b'{"weight_map": {"a": ', b"[]", b'{"weight_map": {}}', b'{"weight_map": 3}', b"\xff"]
)
def test_broken_index(write_checkpoint, raw):
    folder = write_checkpoint({"model.safetensors": {"a": A}})
    (folder / INDEX).write_bytes(raw)
    with pytest.raises(CheckpointError, match=INDEX.replace(".", r"\.")):
        open_checkpoint(folder)


@pytest.mark.fault
def test_all_disagreements_of_index_and_files_in_one_message(write_checkpoint):
    folder = write_checkpoint(
        {"1.safetensors": {"a": A, "both": B}, "2.safetensors": {"both": B, "extra": B}, "3.safetensors": {"c": A}},
        index={
            "weight_map": {
                "a": "1.safetensors",
                "both": "2.safetensors",
                "gone": "1.safetensors",
                "c": "3.safetensors",
                "d": "missing.safetensors",
            }
        },
    )
    (folder / "3.safetensors").write_bytes(b"<html>")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    text = str(error.value)
    assert "'both' is both in 1.safetensors and in 2.safetensors" in text
    assert "'gone' should be in 1.safetensors" in text
    assert "'extra' in 2.safetensors is not in the index" in text
    assert "missing.safetensors cannot be read: No such file" in text
    assert "3.safetensors: expected at least 8 bytes" in text


@pytest.mark.fault
def test_extra_file_is_ignored_with_an_index_and_an_error_without(write_checkpoint):
    folder = write_checkpoint(
        {"1.safetensors": {"a": A}, "2.safetensors": {"b": A}, "consolidated.safetensors": {"a": A, "b": A}},
        index={"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
    )
    assert len(open_checkpoint(folder).files) == 2
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"3 safetensors files .* but no"):
        open_checkpoint(folder)


@pytest.mark.fault
def test_wrong_total_size_is_a_warning(write_checkpoint):
    index = {"metadata": {"total_size": 99}, "weight_map": {"a": "model.safetensors"}}
    (warning,) = open_checkpoint(write_checkpoint({"model.safetensors": {"a": A}}, index=index)).warnings
    assert "99" in warning and "16" in warning


@pytest.mark.fault
def test_nothing_to_load(tmp_path, write_checkpoint):
    with pytest.raises(CheckpointError, match="neither a directory nor"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.fault
def test_link_out_of_the_checkpoint_is_refused_but_the_hub_cache_works(write_checkpoint, tmp_path):
    outside = write_checkpoint({"model.safetensors": {"a": A}}, folder=tmp_path / "outside")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_checkpoint(inside)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    os.rename(outside / "model.safetensors", cache / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (snapshot / "config.json").write_text("{}")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


@pytest.fixture
def some_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_short_reads_are_continued(some_file, monkeypatch):
    whole = os.preadv

    def short(descriptor, buffers, offset):
        return whole(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(1000)
    LocalFile(some_file).read_into(100, memoryview(buffer))
    assert buffer == some_file.read_bytes()[100:1100]


@pytest.mark.fault
def test_read_beyond_the_end(some_file):
    file = LocalFile(some_file)
    with pytest.raises(CheckpointError, match="ends at byte 16384"):
        file.read_into(16_000, memoryview(bytearray(1000)))


@pytest.mark.fault
@pytest.mark.parametrize("how", ["replaced", "written", "truncated", "removed"])
def test_change_during_the_load_is_noticed(some_file, how):
    file = LocalFile(some_file)
    buffer = memoryview(bytearray(100))
    file.read_into(0, buffer)
    content = some_file.read_bytes()
    if how == "replaced":
        some_file.with_name("new").write_bytes(content)
        os.replace(some_file.with_name("new"), some_file)
    elif how == "written":
        some_file.write_bytes(content[::-1])
        os.utime(some_file, ns=(0, 0))
    elif how == "truncated":
        os.truncate(some_file, 1000)
    else:
        some_file.unlink()
    with pytest.raises(CheckpointError, match="No such file" if how == "removed" else "was changed while"):
        file.read_into(0, buffer)


@pytest.mark.fault
@pytest.mark.parametrize("number", [5, 13, 24])  # EIO, EACCES, EMFILE
def test_system_errors_are_reported(some_file, monkeypatch, number):
    file = LocalFile(some_file)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        file.read_into(0, memoryview(bytearray(10)))


def test_reads_hold_no_descriptors(some_file):
    file = LocalFile(some_file)
    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=file.read_into, args=(0, memoryview(bytearray(100)))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_header_longer_than_the_first_read(write_checkpoint):
    tensors = {f"{'x' * 200}.{i}": B for i in range(2000)}
    folder = write_checkpoint({"model.safetensors": tensors})
    assert len(open_checkpoint(folder).tensors) == 2000
