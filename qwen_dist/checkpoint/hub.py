"""A model as the user names it, a directory or a hub id, to a directory."""

from __future__ import annotations

import pathlib
import re

from qwen_dist.errors import CheckpointError

_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_directory(model: str, *, weights: bool = True) -> pathlib.Path:
    """The directory of a checkpoint; a hub id is downloaded (or found in huggingface_hub's cache) first.

    Args:
      model: a directory, a config.json, or an id such as `Qwen/Qwen3-0.6B`.
      weights: False downloads the configuration and the tokenizer only.

    Raises:
      CheckpointError: it is neither, or it cannot be downloaded.
    """
    path = pathlib.Path(model).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B. "
            "Pass --model the directory of a checkpoint in the Hugging Face format."
        )
    import huggingface_hub

    try:
        wanted = [pattern for pattern in _WANTED if weights or "safetensors" not in pattern]
        return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # whatever the network, the hub and its client can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is not a directory here and cannot be downloaded from the hub ({reason}). "
            f"Without a network, pass --model the directory of a downloaded checkpoint."
        ) from error
