"""Save sharded arrays to a Hugging Face directory, atomically and in bounded memory.

Files are created with their headers and full size in a staging directory next to the target. Every process writes the bytes
that its devices hold (of each shard, the first replica) to their place, one chunk at a time. When all processes have
written and synced, the staging directory takes the target's name in one step: at any moment the target is either the
complete old checkpoint or the complete new one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.boxes import box_from_slices, contains, intersect, relative_slices
from qwen_dist.checkpoint.buffers import is_on_host
from qwen_dist.checkpoint.load import ByteCounter, ProgressCallback, fit_to_budget, run_in_threads
from qwen_dist.checkpoint.names import Layout, NameMap, find_layout, name_alone, name_tensors
from qwen_dist.checkpoint.plan import Chunk, Parameter, Shard, chunk_boxes, count_stack_dims
from qwen_dist.checkpoint.safetensors import LENGTH_BYTES, TensorInfo, build_header, dtype_name, parse_header
from qwen_dist.checkpoint.source import Checkpoint, read_header
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import read_json_object
from qwen_dist.storage.files import INDEX_NAME, LOCAL_READ_OPTIONS, SINGLE_FILE_NAME, Folder, LocalFile
from qwen_dist.storage.staging import StagingDirectory, fsync, write_errors

MAX_SHARD_BYTES = 5_000_000_000
# Files that `transformers` and this project's tokenizer read in addition to weights and config.json.
EXTRA_FILE_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def export(
    checkpoint: Checkpoint,
    arrays: Mapping[str, jax.Array],
    output: str | os.PathLike[str],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    carried: Mapping[str, jax.Array] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Save arrays that were loaded from `checkpoint` under the same names, with its tokenizer and configuration.

    Weights that were quantised are written dequantised, as they were loaded. Other arguments and errors as in `save`.
    """
    save(
        arrays,
        output,
        config=checkpoint.config,
        disk_shapes=disk_shapes,
        layout=find_layout(arrays, checkpoint.tensors),
        carried=carried,
        extra_files=read_extra_files(checkpoint.folder) if extra_files is None else extra_files,
        dtypes=dtypes,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        host_memory_budget=host_memory_budget,
        progress=progress,
    )


def read_extra_files(folder: Folder) -> dict[str, bytes]:
    """Return the content of the files of a checkpoint that are copied to another, by name."""
    contents = {name: folder.read(name) for name in (*EXTRA_FILE_NAMES, *folder.template_files())}
    return {name: content for name, content in contents.items() if content is not None}


def save(
    arrays: Mapping[str, jax.Array],
    output: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    layout: Layout | None = None,
    carried: Mapping[str, jax.Array] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a Hugging Face checkpoint directory. Several processes must share the file system.

    Args:
      arrays: parameters by name, in the shapes of the model.
      output: the directory; it is created or replaced atomically.
      config: the content of `config.json`; its dtype and quantisation are updated.
      quantization: the new `quantization_config`; None: the arrays are not quantised.
      disk_shapes: shapes on disk of parameters whose shape is a reshape of it, as in `load`.
      layout: naming of the tensors, as in `names.name_tensors`.
      carried: further arrays by their names on disk; they keep their dtypes.
      extra_files: contents of further files by name.
      dtypes: by parameter name, the dtype on disk; others keep theirs. Values are rounded to it.
      max_shard_bytes: maximum tensor data of a file, unless a single tensor is larger.
      overwrite: replace an existing checkpoint. A directory that is not a checkpoint is never replaced.
      host_memory_budget, progress: as in `load`.

    Raises:
      CheckpointError: the output exists or cannot be written; it is left unchanged.
    """
    staging = StagingDirectory(output)
    shapes = {name: array.shape for name, array in arrays.items()} | dict(disk_shapes or {})
    dtypes = {name: np.dtype((dtypes or {}).get(name, array.dtype)) for name, array in arrays.items()}
    saved_config = _saved_config(config, dtypes, quantization)
    names = name_tensors(shapes, layout=layout)
    if carried:
        alone = name_alone({name: array.shape for name, array in carried.items()})
        names, arrays = NameMap({**names.segments, **alone.segments}), {**arrays, **carried}
        dtypes |= {name: np.dtype(array.dtype) for name, array in carried.items()}
    files = _plan_files(names, dtypes, max_shard_bytes)
    with contextlib.ExitStack() as stack, write_errors(staging.target):
        with sync_processes("preparing to save") as sync_point:
            sync_point.digest = repr(sorted((file.name, file.size, sorted(file.tensors)) for file in files))
            if jax.process_index() == 0:
                stack.enter_context(staging.created(lambda: _check_target(staging.target, overwrite=overwrite)))
                _create_files(staging.path, files)
        with sync_processes("saving"):
            _write_local_shards(arrays, dtypes, names, files, staging.path, host_memory_budget, progress)
        with sync_processes("finishing the save"):
            if jax.process_index() == 0:
                _write_metadata(staging, files, saved_config, extra_files or {})
                staging.commit(_is_of_checkpoint)


@dataclass(frozen=True)
class _OutputFile:
    """A file to be written: its header, its total size in bytes, and its tensors."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


def _plan_files(names: NameMap, dtypes: Mapping[str, np.dtype], max_shard_bytes: int) -> list[_OutputFile]:
    """Distribute all tensors over files in layer order; within a file, wider dtypes come first."""
    tensors = {
        segment.tensor: (dtypes[name], segment.shape) for name, segments in names.segments.items() for segment in segments
    }
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=_natural_key):
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    files = []
    for number, group in enumerate(groups, 1):
        file = SINGLE_FILE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda name: -tensors[name][0].itemsize)
        entries = {name: (dtype_name(tensors[name][0]), tensors[name][1]) for name in group}
        header = build_header(entries, {"format": "pt"})
        total = len(header) + sum(math.prod(tensors[name][1]) * tensors[name][0].itemsize for name in group)
        files.append(_OutputFile(file, header, total, parse_header(file, total, header[LENGTH_BYTES:]).tensors))
    return files


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def check_output(output: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check, before any weight is loaded, that `save` may write to a directory.

    Raises:
      CheckpointError: it exists and may not be replaced, or nothing can be written there.
    """
    staging = StagingDirectory(output)
    with write_errors(staging.target):
        _check_target(staging.target, overwrite=overwrite)
        staging.check()


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if the target exists and may not be replaced."""
    if target == target.parent:
        raise CheckpointError(f"{target} is the root of the file system; choose another output.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists; choose another output, or pass --overwrite (overwrite=True).")
    weights = sorted(path.name for path in target.glob("*.safetensors")) if target.is_dir() else []
    if not (weights and (target / "config.json").is_file()):
        raise CheckpointError(
            f"{printable(target)} is not a checkpoint directory and will not be replaced (it would have config.json and "
            "safetensors files); choose another output."
        )
    # Other files are kept, but weights of another origin would make the new checkpoint ambiguous.
    if others := [name for name in weights if name not in _weight_files(target)]:
        raise CheckpointError(
            f"{printable(target)} holds {printable(', '.join(others))}, which is not of its checkpoint: move it away, or "
            "choose another output."
        )


def _weight_files(target: Path) -> set[str]:
    """Return the names of the weight files that belong to the checkpoint in a directory."""
    with contextlib.suppress(FileNotFoundError):
        weight_map = read_json_object(target / INDEX_NAME).get("weight_map")
        return {SINGLE_FILE_NAME, *map(str, weight_map.values())} if isinstance(weight_map, dict) else {SINGLE_FILE_NAME}
    names = {path.name for path in target.glob("*.safetensors")}
    return names if len(names) == 1 else {SINGLE_FILE_NAME}


def _create_files(staging: Path, files: list[_OutputFile]) -> None:
    """Create all files, each with its header and full size."""
    for file in files:
        with open(staging / file.name, "wb") as handle:
            handle.write(file.header)
            handle.truncate(file.size)


def _write_local_shards(
    arrays: Mapping[str, jax.Array],
    dtypes: Mapping[str, np.dtype],
    names: NameMap,
    files: list[_OutputFile],
    staging: Path,
    budget: int | None,
    progress: ProgressCallback | None,
) -> None:
    """Write and sync the bytes of which this process's devices hold the first replica."""
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    parameters = [_local_parameter(name, arrays[name], dtypes[name], names) for name in sorted(arrays)]
    num_threads, chunk_bytes = fit_to_budget(LOCAL_READ_OPTIONS, parameters, budget)
    chunks = [
        Chunk(parameter, box, tensors[parameter.segments[parameter.segment_index(box)].tensor])
        for parameter in parameters
        for box in chunk_boxes(parameter, chunk_bytes=chunk_bytes, max_gap=0)
    ]
    counter = ByteCounter(sum(chunk.nbytes for chunk in chunks), progress)

    def write(chunk: Chunk) -> None:
        values = _chunk_values(chunk, arrays[chunk.parameter.name])
        _write_at(staging / chunk.tensor.file, chunk, values)
        counter.add(chunk.nbytes)

    run_in_threads(write, chunks, num_threads)
    for file in sorted({chunk.tensor.file for chunk in chunks}):
        fsync(staging / file)


def _local_parameter(name: str, array: jax.Array, dtype: np.dtype, names: NameMap) -> Parameter:
    shards = tuple(
        Shard(box_from_slices(shard.index, array.shape), (shard.device,))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )
    segments = names.segments[name]
    dims = count_stack_dims(name, array.shape, len(segments))
    return Parameter(name, array.shape, np.dtype(array.dtype), array.sharding, dtype, segments, dims, shards)


def _chunk_values(chunk: Chunk, array: jax.Array) -> np.ndarray:
    """Return the chunk's values from the local shards, contiguous, in the dtype on disk."""
    values = None
    for shard in array.addressable_shards:
        box = box_from_slices(shard.index, array.shape)
        common = intersect(chunk.box, box) if shard.replica_id == 0 else None
        if common is None:
            continue
        index = relative_slices(common, box)
        # On the host `np.asarray` does not copy the shard; from a device, transfer only the part that is needed.
        part = np.asarray(shard.data)[index] if is_on_host(chunk.parameter) else np.asarray(shard.data[index])
        if contains(box, chunk.box):
            return np.ascontiguousarray(part, chunk.parameter.disk_dtype)
        if values is None:
            values = np.empty(chunk.shape, chunk.parameter.disk_dtype)
        np.copyto(values[relative_slices(common, chunk.box)], part, casting="unsafe")
    assert values is not None
    return values


def _write_at(path: Path, chunk: Chunk, values: np.ndarray) -> None:
    data = values.reshape(-1).view(np.uint8).data
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for position, offset in zip(range(0, chunk.nbytes, chunk.run_bytes), chunk.offsets(), strict=True):
            run = data[position : position + chunk.run_bytes]
            while run:
                written = os.pwrite(descriptor, run, offset)
                run, offset = run[written:], offset + written
    finally:
        os.close(descriptor)


def _write_metadata(
    staging: StagingDirectory, files: list[_OutputFile], config: Mapping[str, Any], extra_files: Mapping[str, bytes]
) -> None:
    """Check the headers on disk and write everything that is not tensor data, the index last."""
    for file in files:
        written = read_header(LocalFile(staging.path / file.name)).tensors
        assert written == file.tensors
    content = {"config.json": _encode_json(config), **extra_files}
    if len(files) > 1:
        total = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
        weight_map = {name: file.name for file in files for name in file.tensors}
        content[INDEX_NAME] = _encode_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, text in content.items():
        staging.write(name, text)


def _encode_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _saved_config(
    config: Mapping[str, Any], dtypes: Mapping[str, np.dtype], quantization: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the configuration with the dtype of most weights and this quantisation; that of the text model, too."""
    names = [dtype.name for dtype in dtypes.values() if dtype.itemsize > 1 and dtype.kind not in "iu"] or ["bfloat16"]
    most = max(sorted(set(names)), key=names.count)
    saved = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    saved |= {} if quantization is None else {"quantization_config": dict(quantization)}
    saved["dtype" if "dtype" in config else "torch_dtype"] = most
    if isinstance(text := config.get("text_config"), dict):
        saved["text_config"] = text | {key: most for key in ("dtype", "torch_dtype") if text.get(key)}
    return saved


def _is_of_checkpoint(name: str) -> bool:
    """Return whether a file belongs to a checkpoint, so that the new checkpoint's files take its place."""
    return name in ("config.json", INDEX_NAME, *EXTRA_FILE_NAMES) or name.endswith(".safetensors")
