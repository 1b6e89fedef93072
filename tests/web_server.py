"""A web server for directories that injects faults on request and records all requests."""

import http.server
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(http.server.ThreadingHTTPServer):
    """Serves `root` by byte range.

    `faults` are functions(request) -> bool, called in order for every range of a weight file that does not start at byte 0;
    `text_faults` are called for other files. A fault that returns True has answered (or broken) the request itself.
    """

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.requests, self.lock = Path(root), [], threading.Lock()
        self.faults, self.text_faults = [], []
        # Some servers, perhaps the hub, ignore byte ranges of text files; object stores do not.
        self.serves_text_ranges = False
        self.etag = '"version-1"'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Print nothing: the tests break connections on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, self.path, dict(self.headers)))
        file = self.server.root / path.lstrip("/")
        if not file.is_file():
            return self.answer(404)
        is_weight = path.endswith(".safetensors")
        has_ranges = is_weight or self.server.serves_text_ranges
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if has_ranges else None
        size = file.stat().st_size
        self.start, self.stop = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        if match and self.start >= size:
            return self.answer(416)
        with open(file, "rb") as handle:
            handle.seek(self.start)
            self.body = handle.read(self.stop - self.start)
        self.size, self.is_range = size, match is not None
        faults = self.server.faults if self.start > 0 else self.server.text_faults if not is_weight else []
        if any(fault(self) for fault in list(faults)):
            return None
        return self.answer(206 if match else 200, self.body, self.range_headers())

    def range_headers(self):
        headers = {"ETag": self.server.etag, "Last-Modified": "Mon, 05 Jan 2026 10:00:00 GMT", "Accept-Ranges": "bytes"}
        if self.is_range:
            headers["Content-Range"] = f"bytes {self.start}-{self.stop - 1}/{self.size}"
        return headers

    def answer(self, status, body=b"", headers=None, sent=None):
        """Send a response; if `sent` is given, close the connection after that many bytes of the body."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else body[:sent])
        if sent is not None:
            self.close_connection = True
        return True


@contextmanager
def serve(root):
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sometimes(every, fault):
    """Return a fault that injects `fault` into every n-th request."""
    count = iter(range(10**9))
    lock = threading.Lock()

    def maybe(request):
        with lock:
            number = next(count)
        return number % every == 0 and fault(request)

    return maybe


def status(code, headers=None):
    return lambda request: request.answer(code, b"busy", headers)


def cut(request):
    """Send half of the bytes, then close the connection."""
    return request.answer(206, request.body, request.range_headers(), sent=len(request.body) // 2)


def reset(request):
    request.connection.shutdown(2)
    request.close_connection = True
    return True


def stall(seconds):
    def fault(request):
        request.send_response(206)
        for name, value in (request.range_headers() | {"Content-Length": str(len(request.body))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(request.body[:10])
        request.wfile.flush()
        time.sleep(seconds)
        request.close_connection = True
        return True

    return fault


def send_slowly(request, content):
    """Send pieces of `content` until the client has closed the connection."""
    request.close_connection = True
    try:
        while True:
            request.wfile.write(content)
            request.wfile.flush()
            time.sleep(0.02)
    except OSError:
        return True


def endless(request):
    """Send the range, and then more without an end."""
    request.send_response(206)
    for name, value in request.range_headers().items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(request.body)
    return send_slowly(request, b"x" * 1000)


def slow(request):
    """Send one byte of the body from time to time."""
    request.send_response(206)
    for name, value in request.range_headers().items():
        request.send_header(name, value)
    request.end_headers()
    return send_slowly(request, b"x")


def slow_chunks(request):
    """Begin a chunk and never come to its size."""
    request.send_response(206)
    for name, value in (request.range_headers() | {"Transfer-Encoding": "chunked"}).items():
        request.send_header(name, value)
    request.end_headers()
    return send_slowly(request, b"0")


def slow_headers(request):
    request.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX: ")
    return send_slowly(request, b"x")


def redirect(location):
    return lambda request: request.answer(302, headers={"Location": location})


def ignores_range(request):
    return request.answer(200, request.body, {"ETag": request.server.etag})


def wrong_range(request):
    headers = request.range_headers() | {"Content-Range": f"bytes {request.start + 1}-{request.stop}/{request.size}"}
    return request.answer(206, request.body, headers)


def no_range_header(request):
    headers = request.range_headers()
    del headers["Content-Range"]
    return request.answer(206, request.body, headers)


def changed(request):
    return request.answer(206, request.body, request.range_headers() | {"ETag": '"version-2"'})


def grown(request):
    content_range = f"bytes {request.start}-{request.stop - 1}/{request.size + 1}"
    return request.answer(206, request.body, request.range_headers() | {"Content-Range": content_range})


def compressed(request):
    return request.answer(206, request.body, request.range_headers() | {"Content-Encoding": "gzip"})
