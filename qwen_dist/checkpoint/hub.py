"""A model as the user names it, a directory or a hub id, to a directory."""

from __future__ import annotations

import atexit
import pathlib
import re
import shutil
import tempfile

from qwen_dist.errors import CheckpointError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_directory(model: str, *, weights: bool = True) -> pathlib.Path:
    """A directory here with a checkpoint's files; a hub id is downloaded (or found in huggingface_hub's cache) first.

    Args:
      model: a directory, a config.json, an id such as `Qwen/Qwen3-0.6B`, or the `http(s)://`, `gs://` or `s3://` address
        of a directory. From an address only configuration and tokenizer are copied: `load_model` reads the weights there.
      weights: False leaves the weights of a hub id where they are, too.

    Raises:
      CheckpointError: it is none of these, or it cannot be downloaded.
    """
    if "://" in model:
        return _copy_small_files(model)
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
        wanted = [*_SMALL_FILES, *(_WEIGHTS if weights else ())]
        return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # whatever the network, the hub and its client can raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is not a directory here and cannot be downloaded from the hub ({reason}). "
            f"Without a network, pass --model the directory of a downloaded checkpoint."
        ) from error


def _copy_small_files(address: str) -> pathlib.Path:
    from qwen_dist.checkpoint.source import open_folder

    folder = open_folder(address)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="qwen_dist-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in _SMALL_FILES:
        content = folder.read(name)
        if content is not None:
            (directory / name).write_bytes(content)
    return directory
