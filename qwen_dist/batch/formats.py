"""Files of records by the end of their name, .jsonl (or any other), .jsonl.gz, .jsonl.zst or .parquet, anywhere. No jax."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from qwen_dist.batch import remote
from qwen_dist.batch.columns import write_parquet
from qwen_dist.errors import UserError

_ROWS_AT_ONCE = 1024


def is_appendable(path: str) -> bool:
    """Whether a file of this name can simply be appended to."""
    return not (remote.is_url(path) or path.endswith((".gz", ".zst", ".parquet")))


def keeps_lines(path: str) -> bool:
    """Whether lines that are written to a file of this name can be read from it again, byte by byte."""
    return not (remote.is_url(path) or path.endswith(".parquet"))


def exists(path: str) -> bool:
    """Whether there is something, at a path or an address. Raises UserError if that cannot be found out."""
    return remote.exists(path) if remote.is_url(path) else os.path.exists(path)


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file, one at a time; the rows of a parquet file as JSON objects, without empty fields.

    Raises:
      UserError: at once if the file cannot be opened, later if it is damaged.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".parquet"):
            return _guarded(path, _parquet_lines(path))
        return _guarded(path, _file_lines(_open(path)))
    except OSError as error:
        raise UserError(f"cannot read the input {path}: {error.strerror or error}") from error


def write_lines(path: str, lines: Iterable[bytes]) -> None:
    """Write whole lines to a file that is complete or not there. Raises UserError."""
    if remote.is_url(path):
        with remote.open_writer(path) as file:
            _write(file, lines, path)
        return
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            _write(file, lines, path)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _write(file: IO[bytes], lines: Iterable[bytes], name: str) -> None:
    """Write lines to an open file in the form that its name asks for."""
    if name.endswith(".parquet"):
        write_parquet(file, lines, _extra("pyarrow", "parquet", name), _extra("pyarrow.parquet", "parquet", name))
    elif name.endswith(".gz"):
        with gzip.open(file, "wb") as packed:
            packed.writelines(lines)
    elif name.endswith(".zst"):
        with _extra("zstandard", "zstd", name).ZstdCompressor().stream_writer(file, closefd=False) as packed:
            for line in lines:
                packed.write(line)
    else:
        for line in lines:
            file.write(line)


def _open(path: str) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    place = remote.open_reader(path) if remote.is_url(path) else path
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(place, "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(_extra("zstandard", "zstd", path).open(place, "rb"))
    return open(place, "rb") if isinstance(place, str) else place


def _file_lines(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from file


def _parquet_lines(path: str) -> Iterator[bytes]:
    parquet = _extra("pyarrow.parquet", "parquet", path)
    place = remote.open_reader(path) if remote.is_url(path) else path
    file = parquet.ParquetFile(place)  # opened now, so that what is wrong with it is said now

    def rows() -> Iterator[bytes]:
        with contextlib.closing(file):
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    given = {name: value for name, value in row.items() if value is not None}
                    yield json.dumps(given, ensure_ascii=False, default=str).encode() + b"\n"

    return rows()


def _guarded(path: str, lines: Iterator[bytes]) -> Iterator[bytes]:
    """The lines, and a damaged file as a UserError."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"the input {path} is damaged after line {number}: {error}") from error


def _extra(module: str, extra: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path} needs {module.partition('.')[0]}: pip install 'qwen-dist[{extra}]'") from None
