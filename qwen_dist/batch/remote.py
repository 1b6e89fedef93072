"""Files in object stores and on web servers, as streams of bytes: s3://, gs://, az://, http(s)://. No jax."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

from qwen_dist.errors import UserError

_BUFFER_BYTES = 2**20


def is_url(path: str) -> bool:
    """Whether this is an address such as s3://BUCKET/NAME, and no path."""
    return "://" in path


def name_of(url: str) -> str:
    """What is behind the last slash."""
    return url.rpartition("/")[2]


def open_reader(url: str) -> IO[bytes]:
    """The object, to be read in order or anywhere. Raises UserError if there is none."""
    with _told(url):
        obstore, store = _store(url)
        return io.BufferedReader(_Raw(obstore.open_reader(store, name_of(url))), _BUFFER_BYTES)


@contextlib.contextmanager
def open_writer(url: str) -> Iterator[Any]:
    """A stream to the object, which is complete after the block; if the block fails, it is as it was before."""
    with _told(url):
        obstore, store = _store(url)
        with obstore.open_writer(store, name_of(url)) as file:
            yield _Sink(file)


def exists(url: str) -> bool:
    """Whether there is such an object. Raises UserError if that cannot be found out."""
    with _told(url):
        obstore, store = _store(url)
        try:
            obstore.head(store, name_of(url))
        except FileNotFoundError:
            return False
        return True


class _Sink(io.RawIOBase):
    """A file that obstore writes as one of Python's."""

    def __init__(self, file: Any):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(bytes(data))
        return len(data)


class _Raw(io.RawIOBase):
    """A file that obstore reads as one of Python's."""

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


def _store(url: str) -> tuple[Any, Any]:
    try:
        import obstore
        import obstore.store
    except ImportError:
        raise UserError(f"{url} needs obstore: pip install 'qwen-dist[remote]'") from None
    return obstore, obstore.store.from_url(url.rpartition("/")[0])


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # obstore's errors have no base of their own besides Exception; their first line says what happened.
        if not (isinstance(error, OSError) or type(error).__module__.startswith("obstore")):
            raise
        raise UserError(f"{url}: {str(error).strip().splitlines()[0]}") from error
