"""The files of the model that a user names: found once, and each small file read once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import parse_object
from qwen_dist.storage.files import CONFIG_NAME, ConfigFile, Folder, LocalFolder
from qwen_dist.storage.gguf import refuse_gguf
from qwen_dist.storage.hub import HUB_ID, HubFolder, open_hub

_MAX_URL_CHARS = 2000


class ModelFiles:
    """The files of one model.

    Attributes:
      name: as the user gave it.
      folder: where the files are; the weights are read from it by byte range.
    """

    def __init__(self, name: str, folder: Folder):
        self.name, self.folder = name, folder
        self._contents: dict[str, bytes | None] = {}
        self._objects: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, model: ModelName) -> ModelFiles:
        """Find the files of a model. Nothing is read, except that a hub id is looked up.

        Args:
          model: a directory; a `config.json`, where no weights are needed; a hub id such as `Qwen/Qwen3-0.6B` or
            `Qwen/Qwen3-0.6B@main`; the `http(s)://`, `gs://` or `s3://` address of a directory; or files that are open.

        Raises:
          CheckpointError: `model` is none of these, or cannot be reached.
        """
        if isinstance(model, ModelFiles):
            return model
        name = os.fspath(model)
        return cls(name, _open_folder(name))

    def __str__(self) -> str:
        return self.name

    def path(self, name: str) -> str:
        """Return the place of a file, for messages."""
        return printable(f"{str(self.folder).rstrip('/')}/{name}")

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist. Raises CheckpointError."""
        if name not in self._contents:
            self._contents[name] = self.folder.read(name)
        return self._contents[name]

    def read_object(self, name: str) -> Mapping[str, Any] | None:
        """Return the JSON object in a small file, or None if the file does not exist. Raises CheckpointError."""
        content = self.read(name)
        if content is None:
            return None
        if name not in self._objects:
            self._objects[name] = parse_object(content, self.path(name))
        return self._objects[name]

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json`. Raises CheckpointError if there is none."""
        config = self.read_object(CONFIG_NAME)
        if config is None:
            raise CheckpointError(
                f"{printable(self.folder)} is not a checkpoint: it has no {CONFIG_NAME}. "
                "Pass the directory of a Qwen checkpoint in the Hugging Face format."
            )
        return config

    def download(self) -> None:
        """Download the files of a hub id to the hub's cache, and read them there from now on. Raises CheckpointError."""
        if isinstance(self.folder, HubFolder):
            self.folder = self.folder.download()

    def directory(self) -> Path:
        """Return a directory on this machine with all files, downloaded if they are on the hub.

        Raises:
          CheckpointError: they are at an address.
        """
        self.download()
        if not isinstance(self.folder, LocalFolder):
            raise CheckpointError(f"{printable(self.name)} must be a directory on this machine or a hub id here")
        return self.folder.root


ModelName = str | os.PathLike[str] | ModelFiles


def _open_folder(name: str) -> Folder:
    if "://" in name:
        return _open_address(name)
    path = _existing_path(name)
    if path is not None:
        refuse_gguf(path)
        if path.is_dir():
            return LocalFolder(path)
        if path.suffix == ".json":
            return ConfigFile(path)
    elif match := HUB_ID.fullmatch(name):
        refuse_gguf(match[1])
        return open_hub(name)
    raise CheckpointError(
        f"{printable(repr(name))} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B nor an http(s)://, gs:// or "
        "s3:// address. Pass --model the directory of a checkpoint in the Hugging Face format."
    )


def _existing_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a user that does not exist
        return None


def _open_address(url: str) -> Folder:
    from qwen_dist.storage.http import HttpFolder, origin_of
    from qwen_dist.storage.object_store import ObjectFolder

    if len(url) > _MAX_URL_CHARS or not url.isprintable():
        raise CheckpointError(f"{printable(url)} is not a usable address.")
    scheme = origin_of(url)[0]
    if scheme in ("http", "https"):
        return HttpFolder(url.rstrip("/") + "/")
    if scheme in ("gs", "s3"):
        return ObjectFolder(url)
    raise CheckpointError(f"{printable(url)}: addresses begin with http://, https://, gs:// or s3://.")
