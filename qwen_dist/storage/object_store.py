"""Object stores (`gs://`, `s3://`; for data, all that obstore knows). obstore signs, retries and checks ranges."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from qwen_dist.errors import CheckpointError, UserError, printable
from qwen_dist.json_reader import MAX_JSON_BYTES
from qwen_dist.storage.files import REMOTE_READ_OPTIONS, TEMPLATE_DIRECTORY, ByteFile, one_line, require_package


class ObjectFolder:
    """A directory in an object store."""

    read_options = REMOTE_READ_OPTIONS

    def __init__(self, url: str):
        require_package("obstore", "qwen-dist[remote]", url)
        from obstore.store import from_url

        self.url = url.rstrip("/")
        with _object_errors(url):
            self.store = from_url(url)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        try:
            file = ObjectFile(self, name)
        except FileNotFoundError:
            return None
        if file.size > MAX_JSON_BYTES:
            raise CheckpointError(f"{self}/{name} has {file.size} bytes; expected at most {MAX_JSON_BYTES}.")
        content = bytearray(file.size)
        file.read_into(0, memoryview(content))
        return bytes(content)

    def open(self, name: str) -> ByteFile:
        try:
            return ObjectFile(self, name)
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from None

    def weight_files(self) -> list[str]:
        return [name for name in self.names() if name.endswith(".safetensors")]

    def template_files(self) -> list[str]:
        return [name for name in self.names(f"{TEMPLATE_DIRECTORY}/") if name.endswith(".jinja")]

    def names(self, prefix: str | None = None) -> list[str]:
        """Return the sorted names of the objects here, or in the directory `prefix`. Raises CheckpointError."""
        import obstore

        with _object_errors(self.url):
            listing = obstore.list_with_delimiter(self.store, prefix)["objects"]
        return sorted(entry["path"] for entry in listing)


class ObjectFile:
    """An object in an object store, in the version that it had when it was opened."""

    def __init__(self, folder: ObjectFolder, name: str):
        import obstore

        self.name, self._folder = name, folder
        try:
            meta = obstore.head(folder.store, name)
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder}/{name} does not exist.") from None
        except (obstore.exceptions.BaseError, OSError) as error:
            raise CheckpointError(f"{folder}/{name} cannot be opened: {one_line(error)}") from error
        self.size, self._tag = meta["size"], meta["e_tag"]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        import obstore

        if not len(buffer):
            return
        options: Any = {"range": (offset, offset + len(buffer))}
        if self._tag is not None:
            options["if_match"] = self._tag
        try:
            content = memoryview(obstore.get(self._folder.store, self.name, options=options).bytes())
        except (obstore.exceptions.BaseError, OSError) as error:
            raise CheckpointError(
                f"{self._folder}/{self.name}: bytes from {offset} cannot be read: {one_line(error)}"
            ) from error
        if len(content) != len(buffer):
            found = f"{len(content)} bytes instead of {len(buffer)}"
            raise CheckpointError(f"{self._folder}/{self.name}: the store sent {found} from offset {offset}.")
        buffer[:] = content


def object_folder(url: str) -> tuple[ObjectFolder, str]:
    """Return the directory of the object at an address, and the object's name in it."""
    folder, _, name = url.rpartition("/")
    return ObjectFolder(folder), name


def object_exists(url: str) -> bool:
    """Return whether there is an object at an address. Raises CheckpointError if the store cannot be asked."""
    folder, name = object_folder(url)
    try:
        ObjectFile(folder, name)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def object_writer(url: str) -> Iterator[Any]:
    """Open an object for writing; it is replaced at the end of the block, and left unchanged if the block fails."""
    folder, name = object_folder(url)
    import obstore

    try:
        with obstore.open_writer(folder.store, name) as file:
            yield _WriterFile(file)
    except (obstore.exceptions.BaseError, OSError) as error:
        raise UserError(f"{printable(url)} cannot be written: {one_line(error)}") from error


class _WriterFile(io.RawIOBase):
    """An obstore writer as a Python file object."""

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(bytes(data))
        return len(data)


@contextlib.contextmanager
def _object_errors(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # obstore's errors have no common class
        raise CheckpointError(f"{printable(url)} cannot be opened: {one_line(error)}") from error
