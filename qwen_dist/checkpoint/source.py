"""Open and validate a checkpoint: its headers are read, and its tensors are then read by byte range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qwen_dist.checkpoint.safetensors import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import CheckpointError, printable, problem_list
from qwen_dist.storage.files import INDEX_NAME, ByteFile, Folder, ReadOptions, check_weight_map
from qwen_dist.storage.model_files import ModelFiles, ModelName

# One read usually covers the whole header of a file (Qwen's are 10-100 kB).
_FIRST_READ_BYTES = 128 * 1024
_FILES_AT_ONCE = 256


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every header parsed and validated, no tensor data read.

    Attributes:
      model_files: its small files, and where the others are.
      files: the safetensors files by name.
      tensors: every tensor by its name on disk.
      warnings: inconsistencies that do not affect the weights.
    """

    model_files: ModelFiles
    files: Mapping[str, ByteFile]
    tensors: Mapping[str, TensorInfo]
    warnings: tuple[str, ...] = ()

    @property
    def folder(self) -> Folder:
        return self.model_files.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json`."""
        return self.model_files.config

    @property
    def read_options(self) -> ReadOptions:
        return self.folder.read_options

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(model: ModelName) -> Checkpoint:
    """Open a Hugging Face checkpoint and validate all its headers. With several processes it fails on all or on none.

    Args:
      model: as `ModelFiles.open` takes it.

    Raises:
      CheckpointError: there is no checkpoint, or its index or headers are invalid; one message lists every problem.
    """
    with sync_processes(f"opening {model}"):
        return _open(ModelFiles.open(model))


def _open(model_files: ModelFiles) -> Checkpoint:
    folder, _ = model_files.folder, model_files.config  # raises CheckpointError without one
    index = model_files.read_object(INDEX_NAME)
    weight_map = None if index is None else check_weight_map(folder, index)
    names = [_single_weight_file(folder)] if weight_map is None else sorted(set(weight_map.values()))
    files, headers, problems = _open_files(folder, names)
    tensors = _collect_tensors(headers, weight_map, problems)
    if problems:
        raise CheckpointError(f"{folder} cannot be loaded:\n{problem_list(problems)}")
    return Checkpoint(model_files, files, tensors, tuple(_index_warnings(index, tensors)))


def _open_files(folder: Folder, names: Sequence[str]) -> tuple[dict[str, ByteFile], dict[str, Header], list[str]]:
    """Open the weight files; return them, their headers, and the problems of those that cannot be used."""
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
        for start in range(0, len(names), _FILES_AT_ONCE):
            group = names[start : start + _FILES_AT_ONCE]
            for name, opened in zip(group, pool.map(open_one, group), strict=True):
                if isinstance(opened, CheckpointError):
                    problems.append(str(opened))
                else:
                    files[name], headers[name] = opened
            left = len(names) - start - len(group)
            if problems and left > 0:
                # A wrong index may name any number of files, and on a network each costs a request.
                return files, headers, [f"{left} more files were not opened after these problems:", *problems]
    return files, headers, problems


def _index_warnings(index: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    metadata = (index or {}).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if claimed is not None and claimed != total:
        yield f"the index has a total_size of {printable(repr(claimed), 40)} bytes, but the files have {total}"


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


def _single_weight_file(folder: Folder) -> str:
    names = folder.weight_files()
    if len(names) == 1:
        return names[0]
    if names:
        found = printable(", ".join(names), 200)
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
                problems.append(f"tensor {_quoted(name)} is both in {tensors[name].file} and in {tensor.file}")
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if file in headers and name not in headers[file].tensors:
            problems.append(f"tensor {_quoted(name)} should be in {file} according to the index, but is not")
    if weight_map is not None:
        problems += [
            f"tensor {_quoted(name)} in {tensor.file} is not in the index"
            for name, tensor in tensors.items()
            if name not in weight_map
        ]
    return tensors


def _quoted(name: str) -> str:
    return printable(repr(name), 200)
