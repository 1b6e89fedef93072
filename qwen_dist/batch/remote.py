"""Files in object stores and on web servers as byte streams: s3://, gs://, az://, http(s)://. No jax."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

from qwen_dist.errors import UserError, printable

_BUFFER_BYTES = 2**20


def is_url(path: str) -> bool:
    """Return whether this is a URL such as s3://BUCKET/NAME, and not a path."""
    return "://" in path


def object_name(url: str) -> str:
    """Return what follows the last slash."""
    return url.rpartition("/")[2]


def open_reader(url: str) -> IO[bytes]:
    """Open an object for reading, with random access. Raises UserError if it does not exist."""
    with _convert_errors(url):
        obstore, store = _open_store(url)
        return io.BufferedReader(_ReaderFile(obstore.open_reader(store, object_name(url))), _BUFFER_BYTES)


@contextlib.contextmanager
def open_writer(url: str) -> Iterator[Any]:
    """Open an object for writing; it is replaced at the end of the block, and left unchanged if the block fails."""
    with _convert_errors(url):
        obstore, store = _open_store(url)
        with obstore.open_writer(store, object_name(url)) as file:
            yield _WriterFile(file)


def exists(url: str) -> bool:
    """Return whether the object exists. Raises UserError if the store cannot be asked."""
    with _convert_errors(url):
        obstore, store = _open_store(url)
        try:
            obstore.head(store, object_name(url))
        except FileNotFoundError:
            return False
        return True


class _WriterFile(io.RawIOBase):
    """An obstore writer as a Python file object."""

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(bytes(data))
        return len(data)


class _ReaderFile(io.RawIOBase):
    """An obstore reader as a Python file object."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = memoryview(self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


def _open_store(url: str) -> tuple[Any, Any]:
    try:
        import obstore
        import obstore.store
    except ImportError:
        raise UserError(f"{url} needs obstore: pip install 'qwen-dist[remote]'") from None
    return obstore, obstore.store.from_url(url.rpartition("/")[0])


@contextlib.contextmanager
def _convert_errors(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # obstore's errors have no common base class but Exception; their first line says what happened.
        if not (isinstance(error, OSError) or type(error).__module__.startswith("obstore")):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{printable(url)}: {printable(reason)}") from error
