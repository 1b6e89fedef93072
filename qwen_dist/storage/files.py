"""Files of a checkpoint, wherever they are: a folder and its files as interfaces, and those on this machine.

`http`, `hub` and `object_store` have the others; `model_files` opens a folder by the name that a user gives.
"""

from __future__ import annotations

import importlib
import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_dist.errors import CheckpointError, UserError, printable
from qwen_dist.json_reader import MAX_JSON_BYTES, parse_object, read_file

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
TEMPLATE_DIRECTORY = "additional_chat_templates"
_MAX_NAME_BYTES = 255  # the limit of Linux's file systems
_MAX_LISTED = 5


@dataclass(frozen=True)
class ReadOptions:
    """How to read a kind of storage efficiently.

    Attributes:
      num_threads: number of concurrent reads.
      max_gap: number of bytes that are cheaper to read and discard than to skip.
      chunk_bytes: maximum size of a chunk; None if only the destination matters.
    """

    num_threads: int
    max_gap: int
    chunk_bytes: int | None = None


LOCAL_READ_OPTIONS = ReadOptions(num_threads=8, max_gap=16 * 1024)
# A request costs a round trip: use more threads, larger requests, and read gaps up to a megabyte rather than skip them.
REMOTE_READ_OPTIONS = ReadOptions(num_threads=16, max_gap=2**20, chunk_bytes=8 * 2**20)


class ByteFile(Protocol):
    """A file that can be read by byte range from many threads at once."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; raise CheckpointError if that is impossible or the file has changed."""
        ...


class ByteStream(io.RawIOBase):
    """A `ByteFile` as a stream with random access, for readers that take a Python file."""

    def __init__(self, file: ByteFile):
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._file.size - self._position))
        self._file.read_into(self._position, memoryview(buffer)[:count])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.size)[whence]
        return self._position


class LocalFile:
    """A local file. Every read opens it again: no descriptor stays open, and a replaced file is noticed at once."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        try:
            status = os.stat(path)
        except OSError as error:
            raise _io_error(path, error) from error
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe waits until somebody writes to it
            raise CheckpointError(f"{printable(path)} is not a regular file.")
        self._fingerprint = _fingerprint(status)
        self.size = self._fingerprint[0]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._read_from(descriptor, offset, buffer)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _io_error(self.path, error) from error

    def _read_from(self, descriptor: int, offset: int, buffer: memoryview) -> None:
        if _fingerprint(os.fstat(descriptor)) != self._fingerprint:
            raise CheckpointError(f"{self.path} was changed while it was being read; load it again.")
        position = 0
        while position < len(buffer):
            count = os.preadv(descriptor, [buffer[position:]], offset + position)
            if count == 0:
                where = f"bytes [{offset}, {offset + len(buffer)})"
                raise CheckpointError(f"{self.path} ends at byte {offset + position}, inside {where}; it was cut off.")
            position += count


def _fingerprint(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _io_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{printable(path)} cannot be read: {error.strerror or error}.")


class Folder(Protocol):
    """A location that contains a checkpoint's files."""

    @property
    def read_options(self) -> ReadOptions: ...
    def read(self, name: str) -> bytes | None:
        """Return the content of a small file (at most `MAX_JSON_BYTES`), or None if it does not exist."""
        ...

    def open(self, name: str) -> ByteFile:
        """Open a weight file by its (already validated) name; raise CheckpointError if that fails."""
        ...

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files in a folder without an index."""
        ...

    def template_files(self) -> list[str]:
        """Return the names of the named chat templates, to be read; of a folder that cannot be listed, possible names."""
        ...


class LocalFolder:
    """A directory on this machine."""

    read_options = LOCAL_READ_OPTIONS

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            return read_file(path, max_bytes=MAX_JSON_BYTES)
        except FileNotFoundError:
            if path.is_symlink():
                raise CheckpointError(
                    f"{printable(path)} is a link to a file that does not exist; download it again"
                ) from None
            return None

    def open(self, name: str) -> ByteFile:
        return LocalFile(self._path(name))

    def _path(self, name: str) -> Path:
        """Return the path of a file; refuse a symbolic link to a file outside the checkpoint.

        One exception: the hub's cache links `snapshots/<revision>/x` to `blobs/<hash>`, next to `snapshots`.
        """
        path = self.root / name
        try:
            if not path.is_symlink():
                return path
            root, target = self.root.resolve(), path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{printable(path)} cannot be read: {printable(reason)}.") from None
        if not any(target.is_relative_to(folder) for folder in (root, root.parent.parent / "blobs")):
            raise CheckpointError(
                f"{printable(path)} is a symbolic link to {printable(target)}, outside of the checkpoint."
            )
        return path

    def weight_files(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("*.safetensors"))

    def template_files(self) -> list[str]:
        return sorted(f"{TEMPLATE_DIRECTORY}/{path.name}" for path in self.root.glob(f"{TEMPLATE_DIRECTORY}/*.jinja"))


class ConfigFile:
    """A `config.json` without a checkpoint, under any name: enough where no weights and no tokenizer are needed."""

    read_options = LOCAL_READ_OPTIONS

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        return read_file(self.path, max_bytes=MAX_JSON_BYTES) if name == CONFIG_NAME else None

    def open(self, name: str) -> ByteFile:
        raise CheckpointError(f"{printable(self.path)} is only a configuration; give the directory with the weights.")

    def weight_files(self) -> list[str]:
        return []

    def template_files(self) -> list[str]:
        return []


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file of a folder, or None if the file does not exist.

    Raises:
      CheckpointError: the file is not a JSON object, or cannot be read.
    """
    raw = folder.read(name)
    return None if raw is None else parse_object(raw, f"{folder}: {name}")


def check_weight_map(folder: Folder, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the index's map from tensor name to file name, validated before any file is opened."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}: {INDEX_NAME}: expected a non-empty object under weight_map.")
    bad = sorted({printable(repr(value), 80) for value in weight_map.values() if not is_shard_name(value)})
    if bad:
        more = f" and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
        raise CheckpointError(
            f"{folder}: {INDEX_NAME}: weight_map may only name *.safetensors files of the same directory, "
            f"found {', '.join(bad[:_MAX_LISTED])}{more}."
        )
    return weight_map


def is_shard_name(value: object) -> bool:
    """Return whether an index entry is a plain file name, which cannot lead outside its directory or URL."""
    if not isinstance(value, str) or not value.endswith(".safetensors") or not value.isprintable():
        return False
    return len(os.fsencode(value)) <= _MAX_NAME_BYTES and not set(value) & set("/\\:?#%")


def one_line(error: Exception) -> str:
    """Return the first line of the message of a library's error."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def is_url(path: str) -> bool:
    """Return whether this is an address such as s3://BUCKET/NAME, and not a path."""
    return "://" in path


def require_package(module: str, package: str, what: str = "this address") -> Any:
    """Import a module of an optional package. Raises UserError with the command that installs it for `what`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{printable(what)} needs {module.partition('.')[0]}: pip install '{package}'") from error
