"""Files of lines: .jsonl (or any other suffix), .jsonl.gz, .jsonl.zst or .parquet, local or remote. No jax."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from qwen_dist.batch import remote
from qwen_dist.batch.parquet import without_nulls, write_parquet
from qwen_dist.errors import UserError

_ROWS_PER_BATCH = 1024


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
    """Read the lines of a file one at a time; rows of a parquet file become JSON objects without the empty fields.

    Raises:
      UserError: at once if the file cannot be opened, while reading if it is damaged.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".parquet"):
            return _with_user_errors(path, _parquet_lines(path))
        return _with_user_errors(path, _file_lines(_open_decompressed(path)))
    except OSError as error:
        raise UserError(f"cannot read the input {path}: {error.strerror or error}") from error


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


def _open_decompressed(path: str) -> IO[bytes]:
    source = remote.open_reader(path) if remote.is_url(path) else path
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(source, "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(_import_extra("zstandard", "zstd", path).open(source, "rb"))
    return open(source, "rb") if isinstance(source, str) else source


def _file_lines(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from file


def _parquet_lines(path: str) -> Iterator[bytes]:
    parquet = _import_extra("pyarrow.parquet", "parquet", path)
    source = remote.open_reader(path) if remote.is_url(path) else path
    file = parquet.ParquetFile(source)  # open it before the first row is read, to report errors at once

    def rows() -> Iterator[bytes]:
        with contextlib.closing(file):
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    yield json.dumps(without_nulls(row), ensure_ascii=False, default=str).encode() + b"\n"

    return rows()


def _with_user_errors(path: str, lines: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines; raise UserError when the file is damaged."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"the input {path} is damaged after line {number}: {error}") from error


def _import_extra(module: str, extra: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path} needs {module.partition('.')[0]}: pip install 'qwen-dist[{extra}]'") from None
