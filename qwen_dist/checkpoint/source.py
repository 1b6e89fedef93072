"""Where a checkpoint's bytes come from: a directory of files, opened, validated and ready to be read by byte range."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_dist.checkpoint.format import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from qwen_dist.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# One read usually covers the whole header of a shard (Qwen's are 10-100 kB).
_FIRST_READ_BYTES = 128 * 1024


@dataclass(frozen=True)
class Access:
    """How a kind of storage is best read.

    Attributes:
        num_threads: reads under way at a time.
        max_gap: bytes that are cheaper to read and drop than to skip.
        piece_bytes: the size of a read; None where only the destination matters.
    """

    num_threads: int
    max_gap: int
    piece_bytes: int | None = None


LOCAL_ACCESS = Access(num_threads=8, max_gap=16 * 1024)


class ByteFile(Protocol):
    """A file that can be read by byte range from many threads at once."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`; raises CheckpointError when that is not possible or the file has changed."""
        ...


class LocalFile:
    """A local file, opened anew for every read: no descriptor outlives a read, and a replaced file is noticed at once."""

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
                self._read_open(descriptor, offset, buffer)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _io_error(self.path, error) from error

    def _read_open(self, descriptor: int, offset: int, buffer: memoryview) -> None:
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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every header parsed and validated, no tensor data read.

    Attributes:
        name: what the user gave.
        config: the parsed `config.json`.
        files: the safetensors files by name.
        tensors: every tensor by its name on disk.
        access: how the files are best read.
        warnings: oddities that do not make the weights doubtful.
    """

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, ByteFile]
    tensors: Mapping[str, TensorInfo]
    access: Access = LOCAL_ACCESS
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Hugging Face directory of safetensors files and validates all headers.

    Raises:
        CheckpointError: nothing to load there, or an index or a header is wrong; one message lists every problem.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory; give a Hugging Face checkpoint directory.")
    config = _read_json(root / "config.json")
    weight_map = _read_index(root)
    names = sorted(set(weight_map.values())) if weight_map is not None else [_only_file(root)]
    problems: list[str] = []
    files: dict[str, ByteFile] = {}
    headers: dict[str, Header] = {}
    for name in names:
        try:
            files[name] = LocalFile(_contained(root, name))
            headers[name] = read_header(files[name])
        except CheckpointError as error:
            problems.append(str(error))
    tensors = _join(headers, weight_map, problems)
    if problems:
        raise CheckpointError(f"{root} cannot be loaded:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Checkpoint(str(path), config, files, tensors)


def read_header(file: ByteFile) -> Header:
    """Reads and validates the header of one file; never allocates more than the file has bytes."""
    first = bytearray(min(_FIRST_READ_BYTES, file.size))
    file.read_into(0, memoryview(first))
    length = header_length(file.name, file.size, bytes(first))
    raw = bytearray(length)
    have = min(length, len(first) - LENGTH_BYTES)
    raw[:have] = first[LENGTH_BYTES : LENGTH_BYTES + have]
    file.read_into(LENGTH_BYTES + have, memoryview(raw)[have:])
    return parse_header(file.name, file.size, bytes(raw))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint directory needs it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
    return content


def _read_index(root: Path) -> dict[str, str] | None:
    """Tensor name -> file name, validated before any of the files is opened; None without an index."""
    if not (root / INDEX_NAME).exists():
        return None
    weight_map = _read_json(root / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX_NAME}: expected a non-empty object under weight_map.")
    bad = sorted({repr(value) for value in weight_map.values() if not is_shard_name(value)})
    if bad:
        raise CheckpointError(
            f"{root / INDEX_NAME}: weight_map may only name *.safetensors files of the same directory, "
            f"found {', '.join(bad)}."
        )
    return weight_map


def is_shard_name(value: object) -> bool:
    """Whether an index entry is a plain file name that can leave neither its directory nor its URL."""
    return isinstance(value, str) and value.endswith(".safetensors") and not set(value) & set("/\\:\0?#%")


def _only_file(root: Path) -> str:
    names = sorted(entry.name for entry in root.glob("*.safetensors"))
    if (SINGLE_NAME in names[:1] and len(names) == 1) or len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(
            f"{root} has {len(names)} safetensors files ({', '.join(names)}) but no {INDEX_NAME} to say which to load."
        )
    raise CheckpointError(f"{root} has no safetensors file; other weight formats are not read.")


def _contained(root: Path, name: str) -> Path:
    """The path of a shard, refused when a symbolic link takes it out of the checkpoint.

    The hub's cache links `snapshots/<revision>/x` to `blobs/<hash>`, beside `snapshots`: that one way out is allowed.
    """
    path = root / name
    allowed = [root.resolve(), root.resolve().parent.parent / "blobs"]
    if path.is_symlink() and not any(path.resolve().is_relative_to(folder) for folder in allowed):
        raise CheckpointError(f"{path} is a symbolic link to {path.resolve()}, outside of the checkpoint.")
    return path


def _join(
    headers: Mapping[str, Header], weight_map: Mapping[str, str] | None, problems: list[str]
) -> dict[str, TensorInfo]:
    """All tensors of all files; what index and headers disagree on is appended to `problems`."""
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
