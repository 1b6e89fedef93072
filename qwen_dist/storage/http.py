"""Files on web servers, read by byte range.

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
from typing import Any
from urllib.parse import urljoin, urlsplit

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import MAX_JSON_BYTES
from qwen_dist.storage.files import (
    REMOTE_READ_OPTIONS,
    SINGLE_FILE_NAME,
    TEMPLATE_DIRECTORY,
    ByteFile,
    one_line,
    require_package,
)

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
_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED_STATUSES = frozenset({401, 403, 410})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class _TransientError(Exception):
    """An error worth a retry, after `received` bytes had arrived; `delay_s` is the server's requested delay."""

    def __init__(self, message: str, received: int = 0, delay_s: float = 0.0):
        super().__init__(message)
        self.received, self.delay_s = received, delay_s


class HttpFolder:
    """A directory on a web server. `headers` (credentials) are sent only to its scheme, host and port."""

    read_options = REMOTE_READ_OPTIONS

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        urllib3 = require_package("urllib3", "urllib3")
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
                raise _TransientError(one_line(error)) from error
            finally:
                response.close()

        content: bytes | None = _retry(attempt, url)
        return content

    def request(self, url: str, headers: dict[str, str] | None = None) -> tuple[Any, str]:
        """Send a GET request and follow redirects; return the response, of which no body was read, and its address."""
        for _ in range(MAX_REDIRECTS + 1):
            given = {"Accept-Encoding": "identity"} | (headers or {})
            if origin_of(url) == origin_of(self.url):
                given |= self.headers
            try:
                response = self.pool.request("GET", url, headers=given, preload_content=False, redirect=False)
            except _network_error() as error:
                if isinstance(error, ValueError):
                    raise CheckpointError(f"{printable(url)} is not a usable address: {one_line(error)}") from None
                raise _TransientError(one_line(error)) from error
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
                raise CheckpointError(f"{self.url} was changed while it was being read; read it again.")
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


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of an address. Raises CheckpointError if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise CheckpointError(f"{printable(url)} is not a usable address: {one_line(error)}") from None


def _redirect(url: str, location: str) -> str:
    """Return the address that a response of `url` leads to. Raises CheckpointError if it must not be followed."""
    try:
        target = urljoin(url, location)
        scheme = origin_of(target)[0]
    except ValueError as error:
        raise CheckpointError(f"{url}: refused to follow the redirect to {printable(location)}: {error}") from None
    if scheme not in ("http", "https") or (origin_of(url)[0] == "https" and scheme == "http"):
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
        raise CheckpointError(f"{url} was changed while it was being read (HTTP status {response.status}); read it again.")
    if response.status == 404:
        raise CheckpointError(f"{url} was removed while it was being read (HTTP status 404).")
    if response.status == 200:
        raise CheckpointError(f"{url}: the server ignores byte ranges; download it and give the path on this machine.")
    if response.status != 206:
        _raise_status(response, url, expected=206)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise CheckpointError(f"{url}: the server compresses byte ranges; download it and give the path on this machine.")


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
