"""Strict parser and writer of safetensors headers: from bytes to validated descriptions of tensors, and back.

A file is an 8-byte little-endian header length, a JSON header, and the data: one byte range per tensor, which together
cover the data exactly. Everything in a header is checked here before anything is allocated or read because of it.
Specification: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import JsonError, parse_json

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# In written files the data starts at a multiple of this, so that a memory map of them can back a CPU array.
DATA_ALIGNMENT = 64
_MAX_RANK = 32


class FormatError(CheckpointError):
    """A file violates the safetensors format; says which file and tensor, what was expected and what was found."""

    def __init__(self, file: str, tensor: str | None, expected: str, found: str):
        self.file, self.tensor, self.expected, self.found = file, tensor, expected, found
        where = file if tensor is None else f"{file}, tensor {printable(repr(tensor), 200)}"
        super().__init__(f"{where}: expected {expected}, found {found}.")


@dataclass(frozen=True)
class DType:
    """A dtype of the format: its width in bits and the numpy dtype of its bytes (None: known, but never loaded)."""

    name: str
    bits: int
    numpy: np.dtype | None


def _dtypes(*rows: tuple[str, int, Any]) -> dict[str, DType]:
    return {name: DType(name, bits, None if numpy is None else np.dtype(numpy)) for name, bits, numpy in rows}


# All dtypes of the format. No numpy dtype has the same bytes as the sub-byte floats, and a BOOL byte other than 0 or 1 is
# undefined: these are refused by name, not reinterpreted.
DTYPES: Mapping[str, DType] = _dtypes(
    ("BOOL", 8, None),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, np.uint8),
    ("I8", 8, np.int8),
    ("F8_E4M3", 8, ml_dtypes.float8_e4m3fn),
    ("F8_E5M2", 8, ml_dtypes.float8_e5m2),
    ("F8_E8M0", 8, ml_dtypes.float8_e8m0fnu),
    ("F8_E4M3FNUZ", 8, ml_dtypes.float8_e4m3fnuz),
    ("F8_E5M2FNUZ", 8, ml_dtypes.float8_e5m2fnuz),
    ("U16", 16, np.uint16),
    ("I16", 16, np.int16),
    ("F16", 16, np.float16),
    ("BF16", 16, ml_dtypes.bfloat16),
    ("U32", 32, np.uint32),
    ("I32", 32, np.int32),
    ("F32", 32, np.float32),
    ("C64", 64, np.complex64),
    ("U64", 64, np.uint64),
    ("I64", 64, np.int64),
    ("F64", 64, np.float64),
)


def dtype_name(dtype: np.dtype) -> str:
    """Return the format's name of a numpy dtype.

    Raises:
      CheckpointError: the format has no such dtype.
    """
    for entry in DTYPES.values():
        if entry.numpy == dtype:
            return entry.name
    raise CheckpointError(f"dtype {dtype} cannot be written to a safetensors file; allowed: {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: `begin` and `end` are byte offsets from the start of the file `file`."""

    name: str
    file: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A validated header: tensors in the order of their data, and free-text metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def header_length(file: str, size: int, first_bytes: bytes) -> int:
    """Check and return the header length of a file of `size` bytes; `first_bytes` are at least its first 8, if it has 8.

    Raises:
      FormatError: the file is too small, is not a safetensors file (the error says what it looks like), or has a header
        length larger than the file or than `MAX_HEADER_BYTES`.
    """
    if size == 0:
        raise FormatError(file, None, "a safetensors file", "an empty file")
    if size < LENGTH_BYTES:
        raise FormatError(file, None, "at least 8 bytes (the length of the header)", f"a file of {size} bytes")
    length = int.from_bytes(first_bytes[:LENGTH_BYTES], "little")
    if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        if content := _guess_content(first_bytes):
            raise FormatError(file, None, "a safetensors file", content)
        limit = f"a header of at most {min(size - LENGTH_BYTES, MAX_HEADER_BYTES)} bytes in a file of {size} bytes"
        raise FormatError(file, None, limit, f"a header length of {length}")
    if length < 2:
        raise FormatError(file, None, "a JSON header of at least 2 bytes", f"a header length of {length}")
    return length


def _guess_content(first_bytes: bytes) -> str | None:
    """Return what a file that is not safetensors seems to be, for common download errors; else None."""
    start = first_bytes.lstrip()[:64].lower()
    if start.startswith(b"version https://git-lfs"[: len(start)]) and len(start) >= LENGTH_BYTES - 1:
        return "a Git-LFS pointer (run `git lfs pull` to fetch the file itself)"
    if start.startswith((b"<!doctyp", b"<html", b"<?xml")):
        return "an HTML or XML page (the download returned an error page)"
    if start.startswith((b"pk\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle or zip archive (a PyTorch .bin file?), which is never opened"
    if start.startswith(b"gguf"):
        return "a GGUF file"
    if start.startswith((b"{", b"[")):
        return "plain JSON text without a header length"
    return None


def parse_header(file: str, size: int, raw: bytes) -> Header:
    """Parse and validate the JSON header `raw` of a file of `size` bytes.

    Raises:
      FormatError: the header is not UTF-8 or not a JSON object, has duplicate keys, a malformed entry, an unknown dtype, a
        byte range that does not fit dtype and shape or is misaligned, or ranges that overlap, leave a hole, or do not end
        at the end of the file.
    """
    entries = _parse_json(file, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(file, None, "__metadata__ to map strings to strings", _shorten(metadata))
    data_start = LENGTH_BYTES + len(raw)
    tensors = [_parse_entry(file, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_coverage(file, tensors, data_start, size)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def _parse_json(file: str, raw: bytes) -> dict[str, Any]:
    try:
        entries = parse_json(raw)
    except JsonError as error:
        raise FormatError(file, None, "a JSON header", f"text that is none: {error}") from None
    if not isinstance(entries, dict):
        raise FormatError(file, None, "a JSON object as header", f"a JSON {type(entries).__name__}")
    return entries


def _parse_entry(file: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(file, name, "an object with dtype, shape and data_offsets", _shorten(entry))
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise FormatError(file, name, f"one of the dtypes {', '.join(DTYPES)}", _shorten(entry["dtype"]))
    if not _are_sizes(entry["shape"]):
        raise FormatError(file, name, "a shape of non-negative integers", _shorten(entry["shape"]))
    if not _are_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise FormatError(file, name, "data_offsets of two non-negative integers", _shorten(entry["data_offsets"]))
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    bits = math.prod(shape) * dtype.bits
    if len(shape) > _MAX_RANK or bits >= 2**66:
        limits = f"at most {_MAX_RANK} dimensions and less than 2**63 bytes"
        raise FormatError(file, name, limits, f"{len(shape)} dimensions, {_shorten(list(shape))}")
    if 8 * (end - begin) != bits:
        expected = (
            f"{bits} bits for {dtype.name} {list(shape)}"
            if bits % 8
            else f"{bits // 8} bytes for {dtype.name} {list(shape)}"
        )
        raise FormatError(file, name, expected, f"data_offsets [{begin}, {end}] ({end - begin} bytes)")
    if begin % max(1, dtype.bits // 8):
        raise FormatError(file, name, f"data aligned to {dtype.bits // 8} bytes for {dtype.name}", f"offset {begin}")
    return TensorInfo(name, file, dtype, shape, data_start + begin, data_start + end)


def _are_sizes(values: Any) -> bool:
    # `type(...) is int` excludes bool. 2**63 is the limit of the 64-bit integers of other readers.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_coverage(file: str, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            kind = "an overlap" if tensor.begin < position else "a hole"
            found = f"{kind}: bytes [{tensor.begin}, {tensor.end})"
            raise FormatError(file, tensor.name, f"data to start at byte {position} of the file", found)
        position = tensor.end
    if position != size:
        kind = "the file is cut off" if size < position else f"{size - position} trailing bytes"
        last = tensors[-1].name if tensors else None
        raise FormatError(file, last, f"a file of {position} bytes", f"{size} bytes ({kind})")


def _shorten(value: object) -> str:
    return printable(value if isinstance(value, str) else repr(value), 200)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Build the first bytes of a file (length field and header) for tensors given as name -> (dtype name, shape).

    The data must follow in the same order, without gaps; it starts at a multiple of `DATA_ALIGNMENT`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPES[dtype].bits // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
