"""Files of records by the end of their name: .jsonl (or any other), .jsonl.gz, .jsonl.zst; .parquet to read. No jax."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from qwen_dist.errors import UserError

_ROWS_AT_ONCE = 1024


def is_compressed(path: str) -> bool:
    """Whether a file of this name cannot simply be appended to."""
    return path.endswith((".gz", ".zst"))


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file, one at a time; the rows of a parquet file as JSON objects, without empty fields.

    Raises:
      UserError: at once if the file cannot be opened, later if it is damaged.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".parquet"):
            return _guarded(path, _parquet_lines(path))
        return _guarded(path, _file_lines(_open(path, "rb")))
    except OSError as error:
        raise UserError(f"cannot read the input {path}: {error.strerror or error}") from error


def write_lines(path: str, lines: Iterable[bytes]) -> None:
    """Write whole lines to a file that is complete or not there. Raises UserError."""
    partial = f"{path}.partial"
    try:
        with _open(partial, "wb", name=path) as file:
            for line in lines:
                file.write(line)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _open(path: str, mode: str, name: str | None = None) -> IO[bytes]:
    name = name or path
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, mode))
    if name.endswith(".zst"):
        file = _extra("zstandard", "zstd", name).open(path, mode)
        return cast(IO[bytes], io.BufferedReader(file) if mode == "rb" else file)
    return cast(IO[bytes], open(path, mode))


def _file_lines(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from file


def _parquet_lines(path: str) -> Iterator[bytes]:
    parquet = _extra("pyarrow.parquet", "parquet", path)
    file = parquet.ParquetFile(path)  # opened now, so that what is wrong with it is said now

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
