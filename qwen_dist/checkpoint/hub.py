"""Resolve the model that a user names (a directory, a hub id or an address) to a local directory."""

from __future__ import annotations

import atexit
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.gguf import refuse_gguf

_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# organisation/name, and maybe @ with a branch, a tag or a commit.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([\w.-][\w./-]{0,199}))?")


def local_directory(model: str, *, weights: bool = True, files: Sequence[str] = ()) -> pathlib.Path:
    """Return a local directory with a checkpoint's files, after downloading a hub id that is not in the hub's cache.

    Args:
      model: a directory, a config.json, an id such as `Qwen/Qwen3-0.6B` or `Qwen/Qwen3-0.6B@main`, or the `http(s)://`,
        `gs://` or `s3://` address of a directory. Only configuration and tokenizer are copied from an address:
        `load_model` streams its weights.
      weights: False does not download the weights of a hub id either.
      files: download only these files of a hub id.

    Raises:
      CheckpointError: `model` is none of these, or cannot be downloaded.
    """
    if "://" in model:
        return _copy_small_files(model)
    if (path := _existing(model)) is not None:
        refuse_gguf(path)
        return path
    match = _HUB_ID.fullmatch(model)
    if match is not None:
        refuse_gguf(match[1])
    if match is None:
        raise CheckpointError(
            f"{printable(repr(model))} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B. "
            "Pass --model the directory of a checkpoint in the Hugging Face format."
        )
    import huggingface_hub

    try:
        patterns = list(files) or [*_SMALL_FILES, *(_WEIGHT_PATTERNS if weights else ())]
        return pathlib.Path(huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is not a local directory and cannot be downloaded from the hub ({reason}). "
            f"Without a network, pass --model the directory of a downloaded checkpoint."
        ) from error


def _existing(model: str) -> pathlib.Path | None:
    try:
        path = pathlib.Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a user that does not exist
        return None


def _copy_small_files(url: str) -> pathlib.Path:
    from qwen_dist.checkpoint.source import open_folder

    folder = open_folder(url)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="qwen_dist-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name in (*_SMALL_FILES, *folder.template_files()):
        content = None if "*" in name else folder.read(name)
        if content is not None:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
    return directory
