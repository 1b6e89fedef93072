"""Sharded arrays back to a Hugging Face directory: the inverse of the load, streamed and all or nothing.

Every process writes the bytes its devices hold (each shard once, by its first replica) to their place in files laid out
beforehand, a piece at a time, in a directory beside the target. When all have written and synced theirs, the directory
takes the target's name in one step, so that at any moment the target is the old checkpoint or the new one, whole.
"""

import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.agree import together
from qwen_dist.checkpoint.boxes import Box, contains, intersect, relative
from qwen_dist.checkpoint.format import LENGTH_BYTES, TensorInfo, build_header, dtype_name, parse_header
from qwen_dist.checkpoint.load import Counter, Progress, budget_sizes, run_all
from qwen_dist.checkpoint.mapping import PREFIXES, NameMap, find_layout, name_tensors
from qwen_dist.checkpoint.plan import Parameter, Piece, Shard, make_pieces, stack_dims
from qwen_dist.checkpoint.sinks import is_on_host
from qwen_dist.checkpoint.source import INDEX_NAME, LOCAL_ACCESS, SINGLE_NAME, Checkpoint, LocalFile, read_header
from qwen_dist.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
# What `transformers` and the tokenizer of this project read besides weights and config.json.
COMPANION_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
)


def export(
    checkpoint: Checkpoint,
    arrays: Mapping[str, jax.Array],
    output: str | os.PathLike[str],
    *,
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Saves arrays that were loaded from `checkpoint` under the same names, with its tokenizer and configuration.

    Quantised weights are written as they were loaded, dequantised. Other arguments and errors as in `save`.
    """
    prefix, fused_experts = find_layout(arrays, checkpoint.tensors)
    companions = {name: checkpoint.folder.read(name) for name in COMPANION_NAMES}
    save(
        arrays,
        output,
        config=checkpoint.config,
        disk_shapes=disk_shapes,
        prefix=prefix,
        fused_experts=fused_experts,
        companions={name: content for name, content in companions.items() if content is not None},
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        host_memory_budget=host_memory_budget,
        progress=progress,
    )


def save(
    arrays: Mapping[str, jax.Array],
    output: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    disk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    prefix: tuple[str, str] = PREFIXES[0],
    fused_experts: bool = False,
    companions: Mapping[str, bytes] | None = None,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    host_memory_budget: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a Hugging Face checkpoint directory; with several processes, on a file system that all of them share.

    Args:
        arrays: parameters by name, in the shapes of the model.
        output: the directory; it appears, or is replaced, as a whole.
        config: the content of `config.json`; dtype and quantisation are brought up to date.
        disk_shapes: the shape on disk of parameters whose shape is a view of it, as in `load`.
        prefix, fused_experts: the family's naming, as in `mapping.name_tensors`.
        companions: further files by name.
        dtype: floating-point parameters are rounded to it; by default all keep theirs.
        max_shard_bytes: size of tensor data from which a new file is begun.
        overwrite: replace an existing checkpoint; a directory that is not a checkpoint is never replaced.
        host_memory_budget, progress: as in `load`.

    Raises:
        CheckpointError: the output exists, or cannot be written; then it is as it was before.
    """
    target = Path(os.path.abspath(output))
    staging = target.with_name(f".{target.name}.saving")
    shapes = {name: array.shape for name, array in arrays.items()} | dict(disk_shapes or {})
    names = name_tensors(shapes, prefix=prefix, fused_experts=fused_experts)
    dtypes = {name: _saved_dtype(array, dtype) for name, array in arrays.items()}
    files = _lay_out(names, dtypes, max_shard_bytes)
    try:
        with together("preparing to save") as step:
            step.digest = repr(sorted((file.name, file.size, sorted(file.tensors)) for file in files))
            if jax.process_index() == 0:
                _prepare(target, staging, files, overwrite)
        with together("saving"):
            _write_own(arrays, dtypes, names, files, staging, host_memory_budget, progress)
        with together("finishing the save"):
            if jax.process_index() == 0:
                _write_rest(staging, files, _saved_config(config, dtypes), companions or {})
                _commit(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _saved_dtype(array: jax.Array, dtype: np.dtype | None) -> np.dtype:
    is_float = jax.numpy.issubdtype(array.dtype, np.floating)
    return np.dtype(dtype if dtype is not None and is_float else array.dtype)


@dataclass(frozen=True)
class _File:
    """A file to be written: its header, its whole size, and its tensors."""

    name: str
    header: bytes
    size: int
    tensors: Mapping[str, TensorInfo]


def _lay_out(names: NameMap, dtypes: Mapping[str, np.dtype], max_shard_bytes: int) -> list[_File]:
    """Distributes all tensors over files in the order of the layers; within a file wider dtypes come first."""
    tensors = {segment.tensor: (dtypes[name], segment.shape) for name, parts in names.segments.items() for segment in parts}
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=_natural):
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    files = []
    for number, group in enumerate(groups, 1):
        file = SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda name: -tensors[name][0].itemsize)
        entries = {name: (dtype_name(tensors[name][0]), tensors[name][1]) for name in group}
        header = build_header(entries, {"format": "pt"})
        total = len(header) + sum(math.prod(tensors[name][1]) * tensors[name][0].itemsize for name in group)
        files.append(_File(file, header, total, parse_header(file, total, header[LENGTH_BYTES:]).tensors))
    return files


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _prepare(target: Path, staging: Path, files: list[_File], overwrite: bool) -> None:
    """Makes the staging directory with files that have their headers and full size."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise CheckpointError(f"{target} exists; choose another output, or allow it to be overwritten.")
        if not (target / "config.json").is_file():
            raise CheckpointError(
                f"{target} is not a checkpoint directory and will not be replaced; choose another output."
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():  # left behind by a save that was killed
        shutil.rmtree(staging)
    staging.mkdir()
    for file in files:
        with open(staging / file.name, "wb") as handle:
            handle.write(file.header)
            handle.truncate(file.size)


def _write_own(
    arrays: Mapping[str, jax.Array],
    dtypes: Mapping[str, np.dtype],
    names: NameMap,
    files: list[_File],
    staging: Path,
    budget: int | None,
    progress: Progress | None,
) -> None:
    """Writes and syncs the bytes that this process's devices hold as first replicas."""
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    parameters = [_to_be_saved(name, arrays[name], dtypes[name], names) for name in sorted(arrays)]
    num_threads, piece_bytes = budget_sizes(LOCAL_ACCESS, parameters, budget)
    pieces = [
        Piece(parameter, box, tensors[parameter.segments[parameter.segment_of(box)].tensor])
        for parameter in parameters
        for box in make_pieces(parameter, piece_bytes=piece_bytes, max_gap=0)
    ]
    counter = Counter(sum(piece.nbytes for piece in pieces), progress)

    def write(piece: Piece) -> None:
        values = _collect(piece, arrays[piece.parameter.name])
        _write_at(staging / piece.tensor.file, piece, values)
        counter.add(piece.nbytes)

    run_all(write, pieces, num_threads)
    for file in sorted({piece.tensor.file for piece in pieces}):
        _sync(staging / file)


def _to_be_saved(name: str, array: jax.Array, dtype: np.dtype, names: NameMap) -> Parameter:
    shards = tuple(
        Shard(_box(shard, array.shape), (shard.device,)) for shard in array.addressable_shards if shard.replica_id == 0
    )
    segments = names.segments[name]
    dims = stack_dims(name, array.shape, len(segments))
    return Parameter(name, array.shape, np.dtype(array.dtype), array.sharding, dtype, segments, dims, shards)


def _box(shard: jax.Shard, shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(shard.index, shape, strict=True))


def _collect(piece: Piece, array: jax.Array) -> np.ndarray:
    """The piece's values from the local shards, contiguous, in the dtype on disk."""
    values = None
    for shard in array.addressable_shards:
        box = _box(shard, array.shape)
        common = intersect(piece.box, box) if shard.replica_id == 0 else None
        if common is None:
            continue
        index = relative(common, box)
        # On the host a shard is seen without a copy; from a device only the part that is wanted is fetched.
        part = np.asarray(shard.data)[index] if is_on_host(piece.parameter) else np.asarray(shard.data[index])
        if contains(box, piece.box):
            return np.ascontiguousarray(part, piece.parameter.disk_dtype)
        if values is None:
            values = np.empty(piece.shape, piece.parameter.disk_dtype)
        np.copyto(values[relative(common, piece.box)], part, casting="unsafe")
    assert values is not None
    return values


def _write_at(path: Path, piece: Piece, values: np.ndarray) -> None:
    data = values.reshape(-1).view(np.uint8).data
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for position, offset in zip(range(0, piece.nbytes, piece.run_bytes), piece.offsets(), strict=True):
            run = data[position : position + piece.run_bytes]
            while run:
                written = os.pwrite(descriptor, run, offset)
                run, offset = run[written:], offset + written
    finally:
        os.close(descriptor)


def _write_rest(staging: Path, files: list[_File], config: Mapping[str, Any], companions: Mapping[str, bytes]) -> None:
    """Checks the headers as they lie on disk and writes everything that is not tensor data, the index last."""
    for file in files:
        written = read_header(LocalFile(staging / file.name)).tensors
        assert written == file.tensors
    content = {"config.json": _json(config), **companions}
    if len(files) > 1:
        total = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
        weight_map = {name: file.name for file in files for name in file.tensors}
        content[INDEX_NAME] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, text in content.items():
        (staging / name).write_bytes(text)
        _sync(staging / name)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _saved_config(config: Mapping[str, Any], dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    """The configuration with the dtype that most of the weights have, and without a quantisation that is undone."""
    saved = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    names = [dtype.name for dtype in dtypes.values()]
    saved["dtype" if "dtype" in config else "torch_dtype"] = max(sorted(set(names)), key=names.count)
    return saved


def _commit(staging: Path, target: Path) -> None:
    """Gives the finished directory its name, in one step, and removes the one it replaces."""
    _sync(staging)
    if target.exists() and any(target.iterdir()):
        _exchange(staging, target)
    else:
        os.rename(staging, target)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two directories atomically (Linux `renameat2` with RENAME_EXCHANGE)."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    code = -1
    if renameat2 is not None:
        code = renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange)
    if code != 0:
        number = ctypes.get_errno() if renameat2 is not None else errno.ENOSYS
        raise CheckpointError(
            f"{other} cannot be replaced in one step on this file system ({os.strerror(number)}); choose another output."
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
