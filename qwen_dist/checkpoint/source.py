"""Open and validate a checkpoint: a folder of files that are then read by byte range."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_dist.checkpoint.safetensors import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
# One read usually covers the whole header of a file (Qwen's are 10-100 kB).
_FIRST_READ_BYTES = 128 * 1024
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


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


class ByteFile(Protocol):
    """A file that can be read by byte range from many threads at once."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; raise CheckpointError if that is impossible or the file has changed."""
        ...


class LocalFile:
    """A local file. Every read opens it again: no descriptor stays open, and a replaced file is noticed at once."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        try:
            self._fingerprint = _fingerprint(os.stat(path))
        except OSError as error:
            raise _io_error(path, error) from error
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
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}.")


class Folder(Protocol):
    """A location that contains a checkpoint's files."""

    @property
    def read_options(self) -> ReadOptions: ...
    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""
        ...

    def open(self, name: str) -> ByteFile:
        """Open a weight file by its (already validated) name; raise CheckpointError if that fails."""
        ...

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files in a folder without an index."""
        ...


class LocalFolder:
    """A directory on this machine."""

    read_options = LOCAL_READ_OPTIONS

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _io_error(self.root / name, error) from error

    def open(self, name: str) -> ByteFile:
        """Open a weight file; refuse a symbolic link to a file outside the checkpoint.

        One exception: the hub's cache links `snapshots/<revision>/x` to `blobs/<hash>`, next to `snapshots`.
        """
        path, root = self.root / name, self.root.resolve()
        allowed = (root, root.parent.parent / "blobs")
        if path.is_symlink() and not any(path.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(f"{path} is a symbolic link to {path.resolve()}, outside of the checkpoint.")
        return LocalFile(path)

    def weight_files(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("*.safetensors"))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every header parsed and validated, no tensor data read.

    Attributes:
      folder: its location.
      config: the parsed `config.json`.
      files: the safetensors files by name.
      tensors: every tensor by its name on disk.
      warnings: inconsistencies that do not affect the weights.
    """

    folder: Folder
    config: Mapping[str, Any]
    files: Mapping[str, ByteFile]
    tensors: Mapping[str, TensorInfo]
    warnings: tuple[str, ...] = ()

    @property
    def read_options(self) -> ReadOptions:
        return self.folder.read_options

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(location: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face checkpoint and validate all its headers. With several processes it fails on all or on none.

    Args:
      location: a directory, a hub id (`Qwen/Qwen3-8B`, `Qwen/Qwen3-8B@revision`), or the `http(s)://`, `gs://` or
        `s3://` address of a directory.

    Raises:
      CheckpointError: there is no checkpoint, or its index or headers are invalid; one message lists every problem.
    """
    with sync_processes(f"opening {location}"):
        return open_folder_checkpoint(open_folder(location))


def open_folder(location: str | os.PathLike[str]) -> Folder:
    """Open the folder at a location, as in `open_checkpoint`."""
    text = os.fspath(location)
    if "://" in text:
        from qwen_dist.checkpoint.remote import open_url

        return open_url(text)
    if os.path.isdir(text):
        return LocalFolder(Path(text))
    if _HUB_ID.fullmatch(text) and not os.path.exists(text):
        from qwen_dist.checkpoint.remote import open_hub

        return open_hub(text)
    raise CheckpointError(
        f"{text} is neither a directory nor a hub id (organisation/name) nor an http(s)://, gs:// or s3:// address."
    )


def open_folder_checkpoint(folder: Folder) -> Checkpoint:
    """Read and validate index, headers and configuration of a folder."""
    config = read_json(folder, "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; it is not a checkpoint.")
    index = read_json(folder, INDEX_NAME)
    weight_map = None if index is None else check_weight_map(folder, index)
    names = [_single_weight_file(folder)] if weight_map is None else sorted(set(weight_map.values()))
    files: dict[str, ByteFile] = {}
    headers: dict[str, Header] = {}
    problems: list[str] = []

    def open_one(name: str) -> tuple[ByteFile, Header] | CheckpointError:
        try:
            file = folder.open(name)
            return file, read_header(file)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(folder.read_options.num_threads) as pool:
        for name, opened in zip(names, pool.map(open_one, names), strict=True):
            if isinstance(opened, CheckpointError):
                problems.append(str(opened))
            else:
                files[name], headers[name] = opened
    tensors = _collect_tensors(headers, weight_map, problems)
    if problems:
        raise CheckpointError(f"{folder} cannot be loaded:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Checkpoint(folder, config, files, tensors, tuple(_index_warnings(index, tensors)))


def _index_warnings(index: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    metadata = (index or {}).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if claimed is not None and claimed != total:
        yield f"the index has a total_size of {claimed} bytes, but the files have {total}"


def read_header(file: ByteFile) -> Header:
    """Read and validate the header of one file; never allocate more memory than the size of the file."""
    first = bytearray(min(_FIRST_READ_BYTES, file.size))
    file.read_into(0, memoryview(first))
    length = header_length(file.name, file.size, bytes(first))
    raw = bytearray(length)
    received = min(length, len(first) - LENGTH_BYTES)
    raw[:received] = first[LENGTH_BYTES : LENGTH_BYTES + received]
    file.read_into(LENGTH_BYTES + received, memoryview(raw)[received:])
    return parse_header(file.name, file.size, bytes(raw))


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file of a folder, or None if the file does not exist.

    Raises:
      CheckpointError: the file is not a JSON object, or cannot be read.
    """
    raw = folder.read(name)
    if raw is None:
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {name} is not JSON: {type(error).__name__}: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}: {name}: expected a JSON object, found a {type(content).__name__}.")
    return content


def check_weight_map(folder: Folder, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the index's map from tensor name to file name, validated before any file is opened."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}: {INDEX_NAME}: expected a non-empty object under weight_map.")
    bad = sorted({repr(value) for value in weight_map.values() if not is_shard_name(value)})
    if bad:
        raise CheckpointError(
            f"{folder}: {INDEX_NAME}: weight_map may only name *.safetensors files of the same directory, "
            f"found {', '.join(bad)}."
        )
    return weight_map


def is_shard_name(value: object) -> bool:
    """Return whether an index entry is a plain file name, which cannot lead outside its directory or URL."""
    return isinstance(value, str) and value.endswith(".safetensors") and not set(value) & set("/\\:\0?#%")


def _single_weight_file(folder: Folder) -> str:
    names = folder.weight_files()
    if len(names) == 1:
        return names[0]
    if names:
        found = ", ".join(names)
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files ({found}) but no {INDEX_NAME} to choose from them."
        )
    raise CheckpointError(f"{folder} has no safetensors file; other weight formats are not supported.")


def _collect_tensors(
    headers: Mapping[str, Header], weight_map: Mapping[str, str] | None, problems: list[str]
) -> dict[str, TensorInfo]:
    """Return all tensors of all files; append disagreements between index and headers to `problems`."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        for name, tensor in header.tensors.items():
            if name in tensors:
                problems.append(f"tensor {name!r} is both in {tensors[name].file} and in {tensor.file}")
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if file in headers and name not in headers[file].tensors:
            problems.append(f"tensor {name!r} should be in {file} according to the index, but is not")
    if weight_map is not None:
        problems += [
            f"tensor {name!r} in {tensor.file} is not in the index"
            for name, tensor in tensors.items()
            if name not in weight_map
        ]
    return tensors
