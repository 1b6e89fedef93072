"""The Hugging Face hub: a model in the hub's cache on this machine, or on its servers at one commit; files of data sets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from qwen_dist.errors import CheckpointError, UserError, printable
from qwen_dist.storage.files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_FILE_NAME,
    TEMPLATE_DIRECTORY,
    ByteFile,
    Folder,
    LocalFolder,
    check_weight_map,
    one_line,
    read_json,
)
from qwen_dist.storage.http import HttpFolder

# organisation/name, and maybe @ with a branch, a tag or a commit.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([\w.-][\w./-]{0,199}))?")
# hf://datasets/organisation/name, maybe @ with a revision, and a path in the repository.
_DATASET_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.*)")
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja", f"{TEMPLATE_DIRECTORY}/*.jinja", "LICENSE")
_TIMEOUT_S = 10.0


def open_hub(hub_id: str) -> Folder:
    """Open a repository at the commit that its revision names now: from the cache if it is complete there.

    Without a network, the commit is the one that the cache has.

    Args:
      hub_id: `organisation/name` or `organisation/name@revision`.

    Raises:
      CheckpointError: the hub cannot be reached and the cache does not have the repository.
    """
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    name, _, revision = hub_id.partition("@")
    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision or None, timeout=_TIMEOUT_S).sha
    except Exception as error:
        # The hub's client raises errors of several libraries; all mean that the repository cannot be reached.
        if cached := _find_cached(name, revision):
            return cached
        raise CheckpointError(
            f"{hub_id} is not a local directory and cannot be opened on the hub ({one_line(error)}). Without a network, "
            "pass --model the directory of a downloaded checkpoint."
        ) from error
    cached = _find_cached(name, commit or revision)
    if cached and _is_complete(cached):
        return cached
    url = huggingface_hub.hf_hub_url(name, CONFIG_NAME, revision=commit).removesuffix(CONFIG_NAME)
    return HubFolder(url, build_hf_headers(), name, commit)


class HubFolder(HttpFolder):
    """A repository on the hub's servers, read by byte range."""

    def __init__(self, url: str, headers: dict[str, str], name: str, commit: str | None):
        super().__init__(url, headers)
        self._name, self._commit = name, commit

    def download(self) -> LocalFolder:
        """Download the files of the checkpoint to the hub's cache. Raises CheckpointError."""
        import huggingface_hub

        try:
            path = huggingface_hub.snapshot_download(self._name, revision=self._commit, allow_patterns=list(_DOWNLOADED))
        except Exception as error:  # the hub's client raises errors of several libraries
            raise CheckpointError(f"{self._name} cannot be downloaded from the hub: {one_line(error)}") from error
        return LocalFolder(Path(path))


def _find_cached(name: str, revision: str | None) -> LocalFolder | None:
    import huggingface_hub

    try:
        folder = LocalFolder(
            Path(huggingface_hub.snapshot_download(name, revision=revision or None, local_files_only=True))
        )
    except (OSError, ValueError):  # not in the cache
        return None
    has_config = any((folder.root / name).is_file() for name in (CONFIG_NAME, "adapter_config.json"))
    return folder if has_config else None


def _is_complete(folder: LocalFolder) -> bool:
    """Return whether a cached snapshot has its configuration and every file of its index."""
    index = read_json(folder, INDEX_NAME)
    names = {SINGLE_FILE_NAME} if index is None else set(check_weight_map(folder, index).values())
    return all((folder.root / name).is_file() for name in {CONFIG_NAME, *names})


class DatasetFolder(HttpFolder):
    """A directory of a data set on the hub: `hf://datasets/ORGANISATION/NAME[@REVISION]/PATH`."""

    def __init__(self, url: str):
        import huggingface_hub
        from huggingface_hub.utils import build_hf_headers

        match = _DATASET_URL.fullmatch(url.rstrip("/") + "/")
        if match is None:
            raise UserError(
                f"{printable(url)} is not a file on the hub: give hf://datasets/ORGANISATION/NAME/FILE, or NAME@REVISION"
            )
        self._name, self._revision, self._path = match[1], match[2], match[3]
        root = huggingface_hub.hf_hub_url(self._name, "x", repo_type="dataset", revision=self._revision).removesuffix("x")
        super().__init__(root + quote(self._path), build_hf_headers())

    def open(self, name: str) -> ByteFile:
        return super().open(quote(name))

    def names(self) -> list[str]:
        """Return the sorted names of the files in this directory. Raises UserError."""
        import huggingface_hub

        try:
            paths = huggingface_hub.HfApi().list_repo_files(self._name, revision=self._revision, repo_type="dataset")
        except Exception as error:  # the hub's client raises errors of several libraries
            raise UserError(f"the data set {self._name} cannot be opened on the hub: {one_line(error)}") from error
        names = [path.removeprefix(self._path) for path in paths if path.startswith(self._path)]
        return sorted(name for name in names if "/" not in name)
