"""Checkpoints that are not on this machine, read by byte range: web servers, the Hugging Face hub, object stores.

Every response is checked: it must be exactly the requested range, of the version of the file that was found at the start.
Transient errors (a reset, a stall, an overloaded server) are retried a limited number of times, after the last byte
received. Every response has a limit of size and a deadline, so that no server can hold a load forever.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from qwen_dist.checkpoint.files import (
    INDEX_NAME,
    SINGLE_FILE_NAME,
    ByteFile,
    Folder,
    LocalFolder,
    ReadOptions,
    check_weight_map,
    read_json,
)
from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import MAX_JSON_BYTES
from qwen_dist.tokenizer_files import TEMPLATE_DIRECTORY

# A request costs a round trip: use more threads, larger requests, and read gaps up to a megabyte rather than skip them.
REMOTE_READ_OPTIONS = ReadOptions(num_threads=16, max_gap=2**20, chunk_bytes=8 * 2**20)
CONNECT_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 30.0
# A response that comes without a stall, but more slowly than this, is given up, too.
MIN_BYTES_PER_S = 16_384
SMALL_FILE_TIMEOUT_S = 600.0
MAX_ATTEMPTS = 6
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 20.0
MAX_REDIRECTS = 5
_RECEIVE_BYTES = 2**20
_MAX_URL_CHARS = 2000
_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUSES = frozenset({401, 403, 410})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def open_url(url: str) -> Folder:
    """Open the folder at an `http(s)://`, `gs://` or `s3://` address."""
    if len(url) > _MAX_URL_CHARS or not url.isprintable():
        raise CheckpointError(f"{printable(url)} is not a usable address.")
    scheme = _origin(url)[0]
    if scheme in ("http", "https"):
        return HttpFolder(url.rstrip("/") + "/")
    if scheme in ("gs", "s3"):
        return ObjectFolder(url)
    raise CheckpointError(f"{printable(url)}: addresses begin with http://, https://, gs:// or s3://.")


def open_hub(hub_id: str) -> Folder:
    """Open a Hugging Face hub repository: from the local cache if it is complete, else streamed at a fixed commit."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    name, _, revision = hub_id.partition("@")
    try:
        cached = LocalFolder(
            Path(huggingface_hub.snapshot_download(name, revision=revision or None, local_files_only=True))
        )
        if _is_complete(cached):
            return cached
    except (OSError, ValueError):  # not in the cache
        pass
    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision or None).sha
    except Exception as error:
        # The hub's client raises errors of several libraries; all mean that the repository cannot be reached.
        raise CheckpointError(
            f"{hub_id} is not a local directory and cannot be opened on the hub: {_one_line(error)}"
        ) from error
    url = huggingface_hub.hf_hub_url(name, "config.json", revision=commit).removesuffix("config.json")
    return HttpFolder(url, build_hf_headers())


def _is_complete(folder: LocalFolder) -> bool:
    """Return whether a cached snapshot has its configuration and every file of its index."""
    index = read_json(folder, INDEX_NAME)
    names = {SINGLE_FILE_NAME} if index is None else set(check_weight_map(folder, index).values())
    return all((folder.root / name).is_file() for name in {"config.json", *names})


class _TransientError(Exception):
    """An error worth a retry, after `received` bytes had arrived; `delay_s` is the server's requested delay."""

    def __init__(self, message: str, received: int = 0, delay_s: float = 0.0):
        super().__init__(message)
        self.received, self.delay_s = received, delay_s


class HttpFolder:
    """A directory on a web server. `headers` (credentials) are sent only to its scheme, host and port."""

    read_options = REMOTE_READ_OPTIONS

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        urllib3 = _require("urllib3", "urllib3")
        self.url, self.headers = url, headers or {}
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=STALL_TIMEOUT_S)
        retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=0)
        self.pool = urllib3.PoolManager(maxsize=self.read_options.num_threads, timeout=timeout, retries=retries)
        self.pool.pool_classes_by_scheme = _pools_with_deadline()

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """Read a whole small file without a range: some servers serve byte ranges of weights but not of text files."""
        url = urljoin(self.url, name)

        def attempt() -> bytes | None:
            response, _ = self.request(url)
            content = bytearray()
            try:
                if response.status == 404:
                    return None
                if response.status != 200:
                    _raise_status(response, url, expected=200)
                for received in _receive(response, MAX_JSON_BYTES + 1, SMALL_FILE_TIMEOUT_S):
                    content += received
                    if len(content) > MAX_JSON_BYTES:
                        raise CheckpointError(f"{url}: expected at most {MAX_JSON_BYTES} bytes.")
                return bytes(content)
            except _network_error() as error:
                raise _TransientError(_one_line(error)) from error
            finally:
                response.close()

        content: bytes | None = _retry(attempt, url)
        return content

    def request(self, url: str, headers: dict[str, str] | None = None) -> tuple[Any, str]:
        """Send a GET request and follow redirects; return the response, of which no body was read, and its address."""
        for _ in range(MAX_REDIRECTS + 1):
            given = {"Accept-Encoding": "identity"} | (headers or {})
            if _origin(url) == _origin(self.url):
                given |= self.headers
            try:
                response = self.pool.request("GET", url, headers=given, preload_content=False, redirect=False)
            except _network_error() as error:
                if isinstance(error, ValueError):
                    raise CheckpointError(f"{printable(url)} is not a usable address: {_one_line(error)}") from None
                raise _TransientError(_one_line(error)) from error
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response, url
            response.close()
            url = _redirect(url, response.headers["Location"])
        raise CheckpointError(f"{self.url}: more than {MAX_REDIRECTS} redirects.")

    def open(self, name: str) -> ByteFile:
        try:
            return HttpFile(self, name)
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from None

    def weight_files(self) -> list[str]:
        # A web server has no directory listing: without an index there can only be this file.
        return [SINGLE_FILE_NAME]

    def template_files(self) -> list[str]:
        return [f"{TEMPLATE_DIRECTORY}/tool_use.jinja"]


class HttpFile:
    """A file on a web server. Opening it requests its first byte, to get its size, its version and its final address.

    Raises:
      FileNotFoundError: the file does not exist.
      CheckpointError: the server cannot be reached, or does not serve byte ranges.
    """

    def __init__(self, folder: HttpFolder, name: str):
        self.name, self.url, self._folder = name, urljoin(folder.url, name), folder
        # A redirect often leads to a signed address that expires later; use it until then.
        self._final_url = self.url
        self._version: tuple[str | None, str | None] | None = None
        self.size: int = _retry(self._probe, self.url)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        received = 0

        def attempt() -> None:
            nonlocal received
            try:
                self._get(offset + received, buffer[received:])
            except _TransientError as failure:
                received += failure.received
                raise

        if len(buffer):
            _retry(attempt, f"{self.url}, bytes [{offset}, {offset + len(buffer)})")

    def _probe(self) -> int:
        """Request one byte, store version and final address, return the size. For an empty file the status is 416."""
        response, final_url = self._request(0, 1, self.url)
        try:
            if response.status == 404:
                raise FileNotFoundError(f"{self.url} does not exist (HTTP status 404).")
            if response.status == 416:
                return 0
            _check_partial(response, self.url)
            self._final_url, self._version = final_url, _version(response)
            return _content_range(response, self.url, 0, 1)
        finally:
            response.close()

    def _get(self, offset: int, buffer: memoryview) -> None:
        response, _ = self._request(offset, offset + len(buffer), self._final_url)
        if response.status in _DENIED_STATUSES and self._final_url != self.url:
            # The signed address has expired: try the original one, once.
            response.close()
            response, self._final_url = self._request(offset, offset + len(buffer), self.url)
        received = 0
        try:
            _check_partial(response, self.url)
            total = _content_range(response, self.url, offset, offset + len(buffer))
            if total != self.size or _version(response) != self._version:
                raise CheckpointError(f"{self.url} was changed while it was being read; load it again.")
            for content in _receive(response, len(buffer), STALL_TIMEOUT_S + len(buffer) / MIN_BYTES_PER_S):
                buffer[received : received + len(content)] = content
                received += len(content)
            if received < len(buffer):
                raise _TransientError(f"the server sent only {received} of {len(buffer)} bytes", received)
        except _network_error() as error:
            raise _TransientError(f"{type(error).__name__} after {received} bytes", received) from error
        finally:
            if received == len(buffer) and response.length_remaining == 0:
                response.release_conn()
            else:  # the body may have no end
                response.close()

    def _request(self, start: int, stop: int, url: str) -> tuple[Any, str]:
        return self._folder.request(url, {"Range": f"bytes={start}-{stop - 1}"})


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of an address. Raises CheckpointError if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise CheckpointError(f"{printable(url)} is not a usable address: {_one_line(error)}") from None


def _redirect(url: str, location: str) -> str:
    """Return the address that a response of `url` leads to. Raises CheckpointError if it must not be followed."""
    try:
        target = urljoin(url, location)
        scheme = _origin(target)[0]
    except ValueError as error:
        raise CheckpointError(f"{url}: refused to follow the redirect to {printable(location)}: {error}") from None
    if scheme not in ("http", "https") or (_origin(url)[0] == "https" and scheme == "http"):
        raise CheckpointError(f"{url}: refused to follow the redirect to {printable(target)}, which is not https.")
    return target


def _receive(response: Any, max_bytes: int, timeout_s: float) -> Iterator[bytes]:
    """Yield the body as it comes, at most `max_bytes` of it. Raises _TransientError when it takes longer than this."""
    received = 0
    try:
        with _shut_down_after(timeout_s, response.socket):
            while received < max_bytes and (content := response.read1(min(_RECEIVE_BYTES, max_bytes - received))):
                received += len(content)
                yield content
    except TimeoutError as error:
        raise _TransientError(f"{error}: {received} bytes", received) from error


@functools.cache
def _pools_with_deadline() -> dict[str, Any]:
    """Return urllib3's connection pools by scheme, with a deadline for headers; responses have their `socket`."""
    import urllib3

    def with_deadline(pool: Any) -> Any:
        class ConnectionWithDeadline(pool.ConnectionCls):
            def getresponse(self) -> Any:
                connection = self.sock
                with _shut_down_after(STALL_TIMEOUT_S, connection):
                    response = super().getresponse()
                response.socket = connection
                return response

        return type(pool.__name__, (pool,), {"ConnectionCls": ConnectionWithDeadline})

    return {
        "http": with_deadline(urllib3.HTTPConnectionPool),
        "https": with_deadline(urllib3.HTTPSConnectionPool),
    }


@contextlib.contextmanager
def _shut_down_after(seconds: float, connection: socket.socket) -> Iterator[None]:
    """End the block with a TimeoutError when it takes longer than this; the timeout of a socket is for each byte only."""
    is_late = threading.Event()

    def shut_down() -> None:
        is_late.set()
        with contextlib.suppress(OSError):  # it is closed
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if is_late.is_set():  # a response that ends inside its headers counts as whole
        raise TimeoutError(f"not complete after {seconds:.0f} s")


def _one_line(error: Exception) -> str:
    """Return the first line of the message of a library's error."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def _retry(attempt: Callable[[], Any], what: str) -> Any:
    """Call `attempt` until it raises no transient error, at most `MAX_ATTEMPTS` times, and return its result."""
    for number in range(1, MAX_ATTEMPTS + 1):
        try:
            return attempt()
        except _TransientError as failure:
            if number == MAX_ATTEMPTS:
                raise CheckpointError(f"{what}: {failure}; given up after {number} attempts.") from failure
            time.sleep(min(MAX_DELAY_S, max(failure.delay_s, FIRST_DELAY_S * 2 ** (number - 1))))
    raise AssertionError("MAX_ATTEMPTS is at least 1")


def _network_error() -> type[Exception]:
    """Return the base class of urllib3's errors. urllib3 is imported only when a network is used."""
    error: type[Exception] = importlib.import_module("urllib3.exceptions").HTTPError
    return error


def _check_partial(response: Any, url: str) -> None:
    """Raise unless the response is an uncompressed byte range."""
    if response.status in (412, 416):
        raise CheckpointError(f"{url} was changed while it was being read (HTTP status {response.status}); load it again.")
    if response.status == 404:
        raise CheckpointError(f"{url} was removed while it was being read (HTTP status 404).")
    if response.status == 200:
        raise CheckpointError(f"{url}: the server ignores byte ranges; download the checkpoint and load it locally.")
    if response.status != 206:
        _raise_status(response, url, expected=206)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise CheckpointError(f"{url}: the server compresses byte ranges; download the checkpoint and load it locally.")


def _raise_status(response: Any, url: str, *, expected: int) -> None:
    """Raise the error for a status other than the expected one."""
    status = response.status
    if status in _RETRYABLE_STATUSES:
        delay = response.headers.get("Retry-After", "")
        delay_s = float(delay) if re.fullmatch("[0-9]{1,6}", delay) else 0.0
        raise _TransientError(f"HTTP status {status}", delay_s=delay_s)
    if status in _DENIED_STATUSES:
        raise CheckpointError(f"{url}: access is refused (HTTP status {status}); check credentials and permissions.")
    raise CheckpointError(f"{url}: HTTP status {status} where {expected} was expected.")


def _version(response: Any) -> tuple[str | None, str | None]:
    """Return what identifies the content: the entity tag, else the time of modification."""
    tag = response.headers.get("ETag")
    return (tag, None) if tag is not None else (None, response.headers.get("Last-Modified"))


def _content_range(response: Any, url: str, start: int, stop: int) -> int:
    """Check that the response is the requested range; return the size of the whole file."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", text.strip())
    if match is None or (int(match[1]), int(match[2]) + 1) != (start, stop):
        raise CheckpointError(
            f"{url}: requested bytes {start}-{stop - 1}, the server answered with {printable(repr(text), 80)}."
        )
    return int(match[3])


class ObjectFolder:
    """A directory in an object store. obstore signs and retries requests and checks ranges."""

    read_options = REMOTE_READ_OPTIONS

    def __init__(self, url: str):
        _require("obstore", "qwen-dist[remote]")
        from obstore.store import from_url

        self.url = url
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
        import obstore

        with _object_errors(self.url):
            listing = obstore.list_with_delimiter(self.store)["objects"]
        return sorted(entry["path"] for entry in listing if entry["path"].endswith(".safetensors"))

    def template_files(self) -> list[str]:
        import obstore

        listing = obstore.list_with_delimiter(self.store, f"{TEMPLATE_DIRECTORY}/")["objects"]
        return sorted(entry["path"] for entry in listing if entry["path"].endswith(".jinja"))


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
            raise CheckpointError(f"{folder}/{name} cannot be opened: {_one_line(error)}") from error
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
                f"{self._folder}/{self.name}: bytes from {offset} cannot be read: {_one_line(error)}"
            ) from error
        if len(content) != len(buffer):
            found = f"{len(content)} bytes instead of {len(buffer)}"
            raise CheckpointError(f"{self._folder}/{self.name}: the store sent {found} from offset {offset}.")
        buffer[:] = content


@contextlib.contextmanager
def _object_errors(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # obstore's errors have no common class
        raise CheckpointError(f"{printable(url)} cannot be opened: {_one_line(error)}") from error


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(f"This address needs {module}: pip install '{package}'.") from error
