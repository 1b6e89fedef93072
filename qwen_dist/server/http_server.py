"""The HTTP server: uvicorn on a socket, with a limit on the time of a request's head, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_dist.errors import UserError, printable
from qwen_dist.server.service import Service

# A connection without a request is closed after this time.
_KEEP_ALIVE_S = 30
# Bytes of a request's head.
_MAX_HEAD_BYTES = 64 * 1024
# For answers that are written when the server ends.
_CLOSE_S = 3


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises UserError if there is none to be had."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. Otherwise the kernel holds an answer's first token back until the client has acknowledged
        # the head, which takes 40 ms. asyncio sets it only for sockets that are made with the number of the protocol.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, UnicodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(
            f"cannot serve on {printable(host, 100)} port {port}: {reason}; choose a free --port, and an address of this "
            "machine as --host"
        ) from error


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BoundedProtocol(H11Protocol):
    """Closes a connection on which the head of a request does not come in time."""

    head_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_head(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head(self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch_head(False)
        super().connection_lost(exc)

    def _watch_head(self, is_coming: bool) -> None:
        if is_coming and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.close)
        elif not is_coming and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `HttpServer` handles them


class HttpServer:
    """Runs an application until it is told to stop.

    Args:
      app: with the service.
      service: is drained by the first SIGTERM or Ctrl-C; the second ends the process.
      listening: from `bind`.
      header_s: the most seconds for the head of a request.
      drain_s: the most seconds for answers that run when the server is told to stop.
    """

    def __init__(self, app: ASGIApp, service: Service, listening: socket.socket, *, header_s: float, drain_s: float):
        protocol = type("Protocol", (BoundedProtocol,), {"head_s": header_s})
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it writes a line for each malformed request
        self._server = _Server(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            )
        )
        self._service, self._listening, self._drain_s = service, listening, drain_s
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until `stop`, or a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            await self._server.serve(sockets=[self._listening])
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Close all connections after what they are being sent."""
        self._server.should_exit = True

    def drain(self) -> None:
        """Finish the answers that run, then stop."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._drain())

    def _on_signal(self, number: int) -> None:
        if self._stopping is not None:
            os.write(2, b"stopped\n")
            os._exit(128 + number)
        self.drain()

    async def _drain(self) -> None:
        note(f"stopping: at most {self._drain_s:g} s for the answers that run; another signal stops at once")
        if left := await self._service.drain(self._drain_s):
            note(f"{left} answers were not finished")
        self.stop()


def note(text: str) -> None:
    """Write a line about the server to stderr."""
    print(text, file=sys.stderr, flush=True)


async def serve(
    make: Callable[[Callable[[], None], Callable[[BaseException], None]], tuple[Service, ASGIApp]],
    listening: socket.socket,
    on_ready: Callable[[], None],
    on_start: Callable[[Callable[[], object]], None],
    *,
    header_s: float,
    drain_s: float,
) -> None:
    """Serve until the process is told to stop. Raises the error that ended the engine.

    Args:
      make: returns the service and its application from what is called when the engine is ready and when it has failed.
      listening: from `bind`.
      on_ready: called when requests are answered.
      on_start: called with a function that any thread can call: it stops the server as SIGTERM does.
      header_s, drain_s: see `HttpServer`.
    """
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        asyncio.get_running_loop().call_later(0.1, server.stop)  # after the answers that say so

    service, app = make(on_ready, on_failure)
    server = HttpServer(app, service, listening, header_s=header_s, drain_s=drain_s)
    service.engine.start()
    on_start(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, server.drain))
    try:
        await server.run()
    finally:
        service.close()
    await asyncio.to_thread(service.engine.join, _CLOSE_S)
    if service.engine.is_alive():  # it loads or compiles, and the interpreter cannot end while it does
        note("stopped")
        os._exit(1 if failures else 0)
    if failures:
        raise failures[0]
