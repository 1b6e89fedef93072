"""Recognise checkpoints in the GGUF format, to say so instead of naming the files that they lack."""

from __future__ import annotations

import os
import pathlib

from qwen_dist.errors import CheckpointError, printable


def refuse_gguf(location: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if the location is a GGUF file, a hub id of such files, or a directory with nothing else."""
    path = pathlib.Path(location)
    is_repository = path.name.lower().endswith("-gguf") and not path.exists()
    is_directory = not (path / "config.json").exists() and path.is_dir() and next(path.glob("*.gguf"), None) is not None
    if path.suffix.lower() == ".gguf" or is_repository or is_directory:
        raise CheckpointError(
            f"{printable(location)} is in the GGUF format, which is not read: take the model's repository with safetensors "
            "files, usually the one of the same name without GGUF"
        )
