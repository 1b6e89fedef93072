"""Files of lines: .jsonl (or any other suffix), .jsonl.gz, .jsonl.zst or .parquet, local or remote. No jax."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar, cast

from qwen_dist.batch import remote
from qwen_dist.batch.line_reader import UnreadableLine, ZstdFile, bounded_lines
from qwen_dist.batch.parquet import parquet_rows, write_parquet
from qwen_dist.errors import UserError, printable

_T = TypeVar("_T")


def is_appendable(path: str) -> bool:
    """Return whether lines can be appended to a file of this name."""
    return not (remote.is_url(path) or path.endswith((".gz", ".zst", ".parquet")))


def is_lossless(path: str) -> bool:
    """Return whether lines written to a file of this name can be read back byte by byte."""
    return not (remote.is_url(path) or path.endswith(".parquet"))


def exists(path: str) -> bool:
    """Return whether a path or a URL exists. Raises UserError if the store cannot be asked."""
    return remote.exists(path) if remote.is_url(path) else os.path.exists(path)


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Read the lines of a file that this program wrote, of any length; otherwise as `read_bounded_lines`."""
    path = os.fspath(path)
    return map(functools.partial(_readable, path), read_bounded_lines(path, sys.maxsize - 1))


def read_bounded_lines(path: str | os.PathLike[str], max_bytes: int) -> Iterator[bytes | UnreadableLine]:
    """Read the lines of a file one at a time; rows of a parquet file become JSON objects without the empty fields.

    Raises:
      UserError: at once if the file cannot be opened, while reading if it is damaged.
    """
    path = os.fspath(path)
    if path.endswith(".parquet"):
        return map(_row_line, read_rows(path, max_bytes))
    with _opening(path):
        return _with_user_errors(path, "line", _file_lines(*_open_decompressed(path), max_bytes))


def read_rows(path: str, max_bytes: int) -> Iterator[dict[str, Any] | UnreadableLine]:
    """Read the rows of a parquet file one at a time, without the empty fields. Raises UserError as `read_bounded_lines`."""
    parquet = _import_extra("pyarrow.parquet", "parquet", path)
    if not remote.is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {printable(path)}: a parquet file must be a regular file")
    with _opening(path):
        # Open it before the first row is read, to report errors at once.
        file = remote.open_reader(path) if remote.is_url(path) else open(path, "rb")  # noqa: SIM115
        return _with_user_errors(path, "row", parquet_rows(file, parquet, max_bytes))


def partial_path(path: str) -> str:
    """Return the path under which `write_lines` writes until the file is complete."""
    return f"{path}.partial"


def write_lines(path: str, lines: Iterable[bytes]) -> None:
    """Write complete lines to a file, atomically: no partial file is ever visible. Raises UserError."""
    if remote.is_url(path):
        with remote.open_writer(path) as file:
            _write(file, lines, path)
        return
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            _write(file, lines, path)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _write(file: IO[bytes], lines: Iterable[bytes], name: str) -> None:
    """Write lines to an open file in the format given by its name."""
    if name.endswith(".parquet"):
        write_parquet(
            file, lines, _import_extra("pyarrow", "parquet", name), _import_extra("pyarrow.parquet", "parquet", name)
        )
    elif name.endswith(".gz"):
        with gzip.open(file, "wb") as compressed:
            compressed.writelines(lines)
    elif name.endswith(".zst"):
        with _import_extra("zstandard", "zstd", name).ZstdCompressor().stream_writer(file, closefd=False) as compressed:
            for line in lines:
                compressed.write(line)
    else:
        for line in lines:
            file.write(line)


def _open_decompressed(path: str) -> tuple[IO[bytes], IO[bytes]]:
    """Return the open file and the file of its content, which is the same one if it is not compressed."""
    file = remote.open_reader(path) if remote.is_url(path) else open(path, "rb")  # noqa: SIM115
    if not path.endswith((".gz", ".zst")):
        return file, file
    if not cast(io.BufferedReader, file).peek(1):
        raise UserError(f"cannot read {printable(path)}: it is empty, which no compressed file is")
    if path.endswith(".gz"):
        return file, cast(IO[bytes], gzip.open(file, "rb"))
    return file, io.BufferedReader(ZstdFile(file, _import_extra("zstandard", "zstd", path)))


def _file_lines(file: IO[bytes], content: IO[bytes], max_bytes: int) -> Iterator[bytes | UnreadableLine]:
    with file, content:
        yield from bounded_lines(content, max_bytes)


def _row_line(row: dict[str, Any] | UnreadableLine) -> bytes | UnreadableLine:
    if isinstance(row, UnreadableLine):
        return row
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _readable(path: str, line: bytes | UnreadableLine) -> bytes:
    if isinstance(line, UnreadableLine):
        raise UserError(f"{printable(path)}: {line.reason}")
    return line


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, and those of pyarrow
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise UserError(f"cannot read the input {printable(path)}: {reason}") from error


def _with_user_errors(path: str, unit: str, lines: Iterator[_T]) -> Iterator[_T]:
    """Yield the lines; raise UserError when the file is damaged."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except UserError:
        raise
    except Exception as error:  # zlib, zstandard, pyarrow and obstore raise errors without a common class
        raise UserError(f"the input {printable(path)} is damaged after {unit} {number}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """Return the first line of the message of a library's error."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)


def _import_extra(module: str, extra: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path} needs {module.partition('.')[0]}: pip install 'qwen-dist[{extra}]'") from None
