"""Files of records, for batches and for training: found by path, pattern or address, and read within a bound of memory.

A file is JSON lines (.jsonl, and any other name), an array of JSON (.json), a table (.parquet) or one plain text (.txt).
Any but a table may be compressed (.gz, .zst). It is on this machine, on a web server, in an object store, or in a data set
of the Hugging Face hub. No jax.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import glob
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeVar, cast
from urllib.parse import urlsplit

from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.json_reader import JsonError, parse_json
from qwen_dist.storage.files import ByteStream, is_url, one_line, require_package
from qwen_dist.storage.http import HttpFolder
from qwen_dist.storage.hub import DatasetFolder
from qwen_dist.storage.line_reader import UnreadableLine, ZstdFile, bounded_lines, hash64
from qwen_dist.storage.object_store import ObjectFolder
from qwen_dist.storage.parquet import parquet_rows

_T = TypeVar("_T")
Row = bytes | dict[str, Any] | UnreadableLine

COMPRESSED = (".gz", ".zst")
RECORD_SUFFIXES = (*(kind + packed for kind in (".jsonl", ".json") for packed in ("", *COMPRESSED)), ".parquet")
TEXT_SUFFIXES = (".txt", *(".txt" + packed for packed in COMPRESSED))
# An array is held in memory as a whole.
_MAX_ARRAY_BYTES = 2**28
_BUFFER_BYTES = 2**20


def find_files(patterns: Sequence[str], suffixes: Sequence[str], flag: str, *, only_suffixes: bool = False) -> list[str]:
    """Return the files that are named, sorted within each pattern.

    Args:
      patterns: files, addresses, directories, or patterns with `*`. A directory (as an address it ends in "/") stands for
        its files with one of the suffixes. In an address, only the last name may be a pattern.
      suffixes: of the files of a directory.
      flag: that gives the patterns, for messages.
      only_suffixes: refuse every file with another name.

    Raises:
      UsageError: lists every pattern without a file, and every file that does not exist or has another name.
      UserError: a directory at an address cannot be listed.
    """
    matches = [(pattern, _matches(pattern, tuple(suffixes))) for pattern in patterns]
    files = [file for _, found in matches for file in found]
    problems = [
        f"there is no file {printable(pattern)}" if _is_one_file(pattern) else f"no file matches {printable(pattern)}"
        for pattern, found in matches
        if not found
    ]
    problems += [f"{printable(file)} is not a regular file" for file in files if not (is_url(file) or os.path.isfile(file))]
    if only_suffixes:
        wrong = [printable(file) for file in files if not _name(file).endswith(tuple(suffixes))]
        problems += [f"{file}: a data file ends in {', '.join(suffixes)}" for file in wrong]
    if problems:
        raise UsageError(f"{flag} cannot be read: " + "; ".join(problems))
    return files


def _matches(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files that a pattern names, sorted. An address that is no pattern is not looked up."""
    if os.path.lexists(pattern) and not os.path.isdir(pattern):
        return [pattern]
    if not is_url(pattern):
        inside = os.path.join(glob.escape(pattern), "*")
        found = glob.glob(inside if os.path.isdir(pattern) else pattern, recursive=True)
        return sorted(file for file in found if not os.path.isdir(pattern) or file.endswith(suffixes))
    if _is_one_file(pattern):
        return [pattern]
    folder, _, last = pattern.rpartition("/")
    names = _open_folder(folder).names()
    return [f"{folder}/{name}" for name in names if (fnmatch.fnmatch(name, last) if last else name.endswith(suffixes))]


def _is_one_file(pattern: str) -> bool:
    """Return whether a pattern names one file: it is neither a directory nor has a `*`. A web server lists nothing."""
    return _is_web(pattern) or not (glob.has_magic(pattern) or pattern.endswith("/") or os.path.isdir(pattern))


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _open_folder(url: str) -> ObjectFolder | DatasetFolder:
    return DatasetFolder(url) if url.startswith("hf://") else ObjectFolder(url)


def _name(path: str) -> str:
    """Return the path, or the path in an address, whose end says the format."""
    return urlsplit(path).path if _is_web(path) else path


def read_rows(path: str, max_bytes: int) -> Iterator[tuple[int, Row]]:
    """Read the lines of a file, the items of an array or the rows of a table one at a time, each with its number from 1.

    Blank lines are left out, but they count. A byte-order mark at the beginning is not part of the first line. Rows have no
    empty fields.

    Args:
      path: a file or an address, as from `find_files`.
      max_bytes: the most bytes of a line or a row; a longer one is an `UnreadableLine`.

    Raises:
      UserError: at once if the file cannot be opened, while reading if it is damaged.
    """
    if _name(path).endswith(".parquet"):
        return enumerate(_table_rows(path, max_bytes), 1)
    content = _open_content(path)
    if _name(path).removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        with _opening(path):
            start = content.peek(4096)  # type: ignore[attr-defined]
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return enumerate(_array_items(path, content), 1)
    return _not_blank(_lines(path, content, max_bytes))


def _not_an_object(what: str, value: object) -> UnreadableLine:
    shown = printable(repr(value), 80)
    return UnreadableLine(f"the {what} must be a JSON object; it is {shown}", hash64(shown.encode()))


def parse_row(row: Row) -> dict[str, Any]:
    """Return the fields of a line or a row. Raises UserError if it cannot be read, or is not a JSON object."""
    if isinstance(row, UnreadableLine):
        raise UserError(row.reason)
    try:
        fields = parse_json(row) if isinstance(row, bytes) else row
    except JsonError as error:
        raise UserError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(_not_an_object("line", fields).reason)
    return fields


def row_hash(row: Row) -> int:
    """Return 64 bits of the content of a line or a row."""
    if isinstance(row, UnreadableLine):
        return row.hash
    return hash64(row if isinstance(row, bytes) else _json_line(row))


def read_text(path: str, max_bytes: int) -> str:
    """Return the content of a file of plain text. Raises UserError if it is longer, damaged or not UTF-8."""
    try:
        return _read_whole(path, _open_content(path), max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} is not UTF-8: byte {error.start} is not") from None


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Read the lines or rows of a file that this program wrote, of any length, each with the newline at its end."""
    path, no_limit = os.fspath(path), sys.maxsize - 1
    if path.endswith(".parquet"):
        return (_json_line(_readable(path, row)) + b"\n" for row in _table_rows(path, no_limit))
    return (_readable(path, line) for line in _lines(path, _open_content(path), no_limit))


def _open_stream(path: str) -> IO[bytes]:
    """Open a file or an address. Raises UserError if it is no regular file, as reading a pipe might never end."""
    if is_url(path):
        folder, _, name = path.rpartition("/")
        file = HttpFolder(path).open("") if _is_web(path) else _open_folder(folder).open(name)
        return io.BufferedReader(ByteStream(file), _BUFFER_BYTES)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {printable(path)}: it is not a regular file")
    return open(path, "rb")


def _open_content(path: str) -> IO[bytes]:
    """Open a file that is not a table, decompressed."""
    name = _name(path)
    with _opening(path):
        file = _open_stream(path)
        if not name.endswith(COMPRESSED):
            return file
        if not cast(io.BufferedReader, file).peek(1):
            raise UserError(f"cannot read {printable(path)}: it is empty, which no compressed file is")
        if name.endswith(".gz"):
            return cast(IO[bytes], gzip.open(file, "rb"))
        return io.BufferedReader(ZstdFile(file, require_package("zstandard", "qwen-dist[zstd]", path)))


def _table_rows(path: str, max_bytes: int) -> Iterator[dict[str, Any] | UnreadableLine]:
    with _opening(path):
        # Open it before the first row is read, to report errors at once.
        return _with_user_errors(path, "row", parquet_rows(_open_stream(path), path, max_bytes))


def _lines(path: str, content: IO[bytes], max_bytes: int) -> Iterator[bytes | UnreadableLine]:
    def lines() -> Iterator[bytes | UnreadableLine]:
        with content:
            yield from bounded_lines(content, max_bytes)

    return _with_user_errors(path, "line", lines())


def _not_blank(lines: Iterator[bytes | UnreadableLine]) -> Iterator[tuple[int, bytes | UnreadableLine]]:
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
        if line:
            yield number, line


def _read_whole(path: str, content: IO[bytes], max_bytes: int) -> bytes:
    found = bytearray()
    for line in _lines(path, content, max_bytes):
        if isinstance(line, UnreadableLine) or len(found) + len(line) > max_bytes:
            raise UserError(f"{printable(path)} has more than {max_bytes} bytes, which is the most that is read at once")
        found += line
    return bytes(found)


def _array_items(path: str, content: IO[bytes]) -> list[dict[str, Any] | UnreadableLine]:
    try:
        items = parse_json(_read_whole(path, content, _MAX_ARRAY_BYTES).removeprefix(codecs.BOM_UTF8))
    except JsonError as error:
        raise UserError(f"{printable(path)} is not JSON: {error}; a large file is better written as JSON lines") from None
    return [item if isinstance(item, dict) else _not_an_object("item", item) for item in items]


def _json_line(row: dict[str, Any]) -> bytes:
    """Return a row as JSON; values that JSON does not have become text."""
    return json.dumps(row, ensure_ascii=False, default=str).encode()


def _readable(path: str, row: _T | UnreadableLine) -> _T:
    if isinstance(row, UnreadableLine):
        raise UserError(f"{printable(path)}: {row.reason}")
    return row


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, and those of zlib, zstandard and pyarrow
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(f"cannot read the input {printable(path)}: {reason}") from error


def _with_user_errors(path: str, unit: str, rows: Iterator[_T]) -> Iterator[_T]:
    """Yield the lines or rows; raise UserError when the file is damaged."""
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except UserError:
        raise
    except Exception as error:  # zlib, zstandard and pyarrow raise errors without a common class
        raise UserError(f"the input {printable(path)} is damaged after {unit} {number}: {one_line(error)}") from error
