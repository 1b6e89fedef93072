"""The reader accepts what the safetensors library writes, and says what is wrong with any other file."""

import json
import resource
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_dist.checkpoint import safetensors as reader
from qwen_dist.checkpoint.source import read_header
from qwen_dist.errors import CheckpointError
from qwen_dist.storage.files import LocalFile


def build(header, data=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    return read_header(LocalFile(path))


def test_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((3, 5)).astype("bfloat16"),
        "b": rng.standard_normal((2, 2)).astype("float32"),
        "c": np.array(7, "int64"),
        "empty": np.zeros((0, 4), "float16"),
        "f8": rng.standard_normal((4, 4)).astype(ml_dtypes.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(LocalFile(path))
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    content = path.read_bytes()
    for name, value in tensors.items():
        info = header.tensors[name]
        assert (info.shape, info.dtype.numpy) == (value.shape, value.dtype)
        assert content[info.begin : info.end] == value.tobytes()


def test_every_dtype_of_the_format_is_known():
    """Both readers accept a tensor of each dtype with one element (eight for sub-byte dtypes)."""
    for dtype in reader.DTYPES.values():
        shape = [8] if dtype.bits < 8 else [1]
        size = shape[0] * dtype.bits // 8
        content = build({"x": entry(shape, 0, size, dtype.name)}, b"\0" * size)
        parsed = reader.parse_header("f", len(content), content[8:-size])
        assert parsed.tensors["x"].nbytes == size
        if dtype.name not in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):  # newer than the library
            assert safetensors.deserialize(content)[0][0] == "x"


def test_written_headers_are_aligned_and_readable():
    tensors = {"a": ("BF16", (3,)), "b": ("BF16", (5, 2))}
    header = reader.build_header(tensors, {"format": "pt"})
    assert len(header) % reader.DATA_ALIGNMENT == 0
    content = header + bytes(26)
    assert sorted(name for name, _ in safetensors.deserialize(content)) == ["a", "b"]
    assert reader.parse_header("f", len(content), header[8:]).tensors["b"].begin == len(header) + 6


ONE = json.dumps(entry([1], 0, 4)).encode()
ACCEPTED = {
    "leading whitespace": build(b"  " + json.dumps({"x": entry([1], 0, 4)}).encode(), bytes(4)),
    "padding to 4096": build(json.dumps({"x": entry([1], 0, 4)}).encode().ljust(4088), bytes(4)),
    "no tensors": build({}),
    "empty metadata": build({"__metadata__": {}, "x": entry([1], 0, 4)}, bytes(4)),
    "zero-size tensor": build({"x": entry([0, 3], 0, 0), "y": entry([1], 0, 4)}, bytes(4)),
    "rank 0": build({"x": entry([], 0, 4)}, bytes(4)),
    "names of all kinds": build(
        {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(["", "a\0b", "x" * 10_000, "ü/../..", "."])}, bytes(20)
    ),
    "NaN and infinity in the data": build({"x": entry([2], 0, 8)}, struct.pack("<ff", float("nan"), float("inf"))),
}


@pytest.mark.fault
@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_valid(tmp_path, case):
    read(tmp_path, ACCEPTED[case])
    safetensors.deserialize(ACCEPTED[case])


REJECTED = {
    "empty file": (b"", "an empty file"),
    "seven bytes": (b"1234567", "a file of 7 bytes"),
    "header longer than file": (build({}, length=10_000), "a header length of 10000"),
    "header length above the cap": (build({}, length=reader.MAX_HEADER_BYTES + 1), "a header length of 100000001"),
    "header length 2**63": (build({}, length=2**63), f"a header length of {2**63}"),
    "header length 2**64-1": (build({}, length=2**64 - 1), f"a header length of {2**64 - 1}"),
    "header length 0": (build(b""), "a header length of 0"),
    "not UTF-8": (build(b'{"\xff\xfe": 1}'), "byte 2 is not UTF-8"),
    "invalid JSON": (build(b'{"x": '), "Expecting value"),
    "JSON array": (build(b"[1, 2]"), "a JSON list"),
    "byte-order mark": (build(b"\xef\xbb\xbf{}"), "byte-order mark"),
    "deep nesting": (build(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested deeper"),
    "huge integer": (build(b'{"x": ' + b"9" * 10_000 + b"}"), "a number has 10000 digits"),
    "NaN in the header": (
        build(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, 4]}}', bytes(4)),
        "NaN is not a JSON number",
    ),
    "metadata not strings": (build({"__metadata__": {"a": 1}}), "{'a': 1}"),
    "metadata not an object": (build({"__metadata__": "a"}), "strings to strings"),
    "duplicate tensor": (
        build(b'{"x": %s, "x": %s}' % (ONE, ONE), bytes(4)),
        "the key 'x' occurs twice",
    ),
    "duplicate field": (
        build(b'{"x": {"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
         "the key 'dtype' occurs twice",
    ),
    "entry not an object": (build({"x": 3}), "found 3"),
    "field missing": (build({"x": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets"),
    "unknown field": (build({"x": entry([1], 0, 4) | {"strides": [1]}}, bytes(4)), "strides"),
    "unknown dtype": (build({"x": entry([1], 0, 4, "Q4")}, bytes(4)), "found Q4"),
    "lower-case dtype": (build({"x": entry([1], 0, 4, "f32")}, bytes(4)), "found f32"),
    "dtype not a string": (build({"x": entry([1], 0, 4, 7)}, bytes(4)), "found 7"),
    "overlap": (build({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)), "an overlap"),
    "hole": (build({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)), "a hole"),
    "hole at the start": (build({"x": entry([1], 4, 8)}, bytes(8)), "a hole"),
    "trailing bytes": (build({"x": entry([1], 0, 4)}, bytes(8)), "4 trailing bytes"),
    "truncated data": (build({"x": entry([4], 0, 16)}, bytes(8)), "the file is cut off"),
    "end before begin": (build({"x": entry([1], 4, 0)}, bytes(4)), "-4 bytes"),
    "length too short": (build({"x": entry([4], 0, 4)}, bytes(4)), "(4 bytes)"),
    "length too long": (build({"x": entry([1], 0, 8)}, bytes(8)), "(8 bytes)"),
    "negative offset": (build({"x": entry([1], -4, 0)}, bytes(4)), "[-4, 0]"),
    "offset above 2**63": (build({"x": entry([1], 2**63, 2**63 + 4)}, bytes(4)), str(2**63)),
    "fractional shape": (build(b'{"x": {"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}', bytes(16)), "[4.0]"),
    "boolean shape": (build(b'{"x": {"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)), "[True]"),
    "negative shape": (build({"x": entry([-1], 0, 4)}, bytes(4)), "[-1]"),
    "shape not a list": (build({"x": entry("4", 0, 16)}, bytes(16)), "found 4"),
    "three offsets": (
        build(b'{"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', bytes(4)),
        "[0, 4, 4]",
    ),
    "shape overflows 64 bits": (build({"x": entry([2**62, 2**62], 0, 4)}, bytes(4)), "less than 2**63 bytes"),
    "a shape of a very large product": (build({"x": entry([2**62] * 40, 0, 4)}, bytes(4)), "found 40 dimensions"),
    "many dimensions": (build({"x": entry([1] * 40, 0, 4)}, bytes(4)), "at most 32 dimensions"),
    "half of a surrogate pair": (build(b'{"\\ud800": %s}' % ONE, bytes(4)), "half of a surrogate pair"),
    "one of 300000 keys twice": (
        build(b"{" + b",".join(b'"%d": 1' % (n % 299_999) for n in range(300_000)) + b"}"),
        "the key '0' occurs twice",
    ),
    "not a whole byte": (build({"x": entry([3], 0, 1, "F4")}, bytes(1)), "12 bits"),
    "misaligned": (
        build({"x": entry([1], 0, 1, "U8"), "y": entry([1], 1, 5)}, bytes(5)),
        "offset 1",
    ),
    "Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git-LFS pointer"),
    "HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML or XML page"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." + bytes(64), "a pickle or zip archive"),
    "zip": (b"PK\x03\x04" + bytes(200), "a pickle or zip archive"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\x11" * 40, "a GGUF file"),
    "bare JSON": (b'{"error": "Repository not found"}', "plain JSON text"),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("case", REJECTED)
def test_rejected_with_file_and_reason(tmp_path, case):
    content, found = REJECTED[case]
    with pytest.raises(reader.FormatError) as error:
        read(tmp_path, content)
    assert error.value.file == "file.safetensors" and error.value.file in str(error.value)
    assert found in str(error.value) and len(str(error.value)) < 600
    if error.value.tensor is not None:
        assert repr(error.value.tensor) in str(error.value)


@pytest.mark.fault
def test_no_allocation_of_sizes_claimed_by_a_header(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (10_000_000_000, 2**40, 2**62):
        with pytest.raises(reader.FormatError):
            read(tmp_path, build({}, bytes(1000), length=length))
    with pytest.raises(reader.FormatError):
        read(tmp_path, build({"x": entry([2**40], 0, 2**42)}, bytes(16)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # kB


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_never_accepts_what_the_library_rejects(data):
    """In a valid file with random changes: if this reader accepts it, so does the library, with the same byte ranges."""
    content = bytearray(build({"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16")}, bytes(32)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from(b'0123456789[]{},:" -.BFI\x00\xff'))
    content = bytes(content)
    try:
        length = reader.header_length("f", len(content), content)
        parsed = reader.parse_header("f", len(content), content[8 : 8 + length]).tensors
    except CheckpointError:
        return
    oracle = {name: (info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(content)}
    assert {name: (list(info.shape), content[info.begin : info.end]) for name, info in parsed.items()} == oracle
