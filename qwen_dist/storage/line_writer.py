"""Write files of lines as a whole: plain, .gz, .zst or .parquet, local or in an object store. No jax."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable
from typing import IO

from qwen_dist.errors import UserError
from qwen_dist.storage.files import is_url, require_package
from qwen_dist.storage.object_store import object_exists, object_writer
from qwen_dist.storage.parquet import write_parquet


def is_appendable(path: str) -> bool:
    """Return whether lines can be appended to a file of this name."""
    return not (is_url(path) or path.endswith((".gz", ".zst", ".parquet")))


def is_lossless(path: str) -> bool:
    """Return whether lines written to a file of this name can be read back byte by byte."""
    return not (is_url(path) or path.endswith(".parquet"))


def exists(path: str) -> bool:
    """Return whether a path or a URL exists. Raises UserError if the store cannot be asked."""
    return object_exists(path) if is_url(path) else os.path.exists(path)


def partial_path(path: str) -> str:
    """Return the path under which `write_lines` writes until the file is complete."""
    return f"{path}.partial"


def write_lines(path: str, lines: Iterable[bytes]) -> None:
    """Write complete lines to a file, atomically: no partial file is ever visible. Raises UserError."""
    if is_url(path):
        with object_writer(path) as file:
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
        write_parquet(file, lines, name)
    elif name.endswith(".gz"):
        with gzip.open(file, "wb") as compressed:
            compressed.writelines(lines)
    elif name.endswith(".zst"):
        zstandard = require_package("zstandard", "qwen-dist[zstd]", name)
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as compressed:
            for line in lines:
                compressed.write(line)
    else:
        for line in lines:
            file.write(line)
