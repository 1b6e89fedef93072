"""Render chat templates in a separate process, started at the first template and again after it was killed.

A template that takes too long or too much memory, or makes the interpreter crash, ends only that process.
"""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_dist.errors import CheckpointError, UserError, printable

_WORKER = pathlib.Path(__file__).with_name("template_worker.py")
_START_TIMEOUT_S = 60.0
# The worker ends itself after 5 s of processor time; this holds where it does not get the processor.
_REPLY_TIMEOUT_S = 30.0
_MAX_REQUEST_BYTES = 64 * 2**20
_MAX_REPLY_BYTES = 2**30
# A template that has ended the worker so often is not tried again: each time costs seconds.
_MAX_KILLS = 2


def render(source: str, inputs: Sequence[Mapping[str, Any]]) -> list[str | UserError]:
    """Render a template with each of the inputs, which are JSON values.

    Returns:
      For each input the text, or the error that rendering it ended with.

    Raises:
      CheckpointError: the template does not compile, or exceeds the limits.
      UserError: the inputs are too large.
    """
    reply = _process.ask(source, inputs)
    if "broken" in reply:
        raise CheckpointError(f"the checkpoint's chat template is broken: {printable(reply['broken'])}")
    return [
        result["text"]
        if "text" in result
        else UserError(f"the chat template cannot be rendered with these messages: {printable(result['error'])}")
        for result in reply["results"]
    ]


class _Process:
    """The worker process and the socket to it. One request is answered at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._owner = 0
        # The numbers of the templates that this worker has: a template has up to megabytes, and is sent once.
        self._numbers: dict[str, int] = {}
        self._kills: dict[str, list[str]] = {}

    def ask(self, source: str, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the worker's reply. Raises UserError or CheckpointError where there is none."""
        try:
            content = json.dumps(inputs).encode()
        except (TypeError, ValueError, RecursionError) as error:  # such as a date in a table
            raise UserError(f"the chat has a value that is not of JSON: {printable(error)}") from None
        if len(content) > _MAX_REQUEST_BYTES:
            raise UserError(f"the chat has {len(content)} bytes; the chat template takes at most {_MAX_REQUEST_BYTES}")
        with self._lock:
            kills = self._kills.get(source, [])
            if len(kills) < _MAX_KILLS:
                try:
                    self._start()
                    self._send(self._template_message(source))
                    self._send(content)
                    return self._receive(_REPLY_TIMEOUT_S)
                except OSError:
                    kills = self._kills.setdefault(source, kills)
                    kills.append(self._stop(wait=1.0))
                except BaseException:  # Ctrl-C: the next request must not get this one's reply
                    self._stop()
                    raise
        raise CheckpointError(f"the checkpoint's chat template is broken: {kills[-1]}")

    def _start(self) -> None:
        # After a fork, the process belongs to the parent.
        if self._popen is not None and self._owner == os.getpid() and self._popen.poll() is None:
            return
        self._numbers = {}
        try:
            self._socket, there = socket.socketpair()
            self._owner = os.getpid()
            with there:
                # A new session, so that Ctrl-C does not reach it.
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER)],
                    stdin=there.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._receive(_START_TIMEOUT_S)
        except OSError as error:
            raise UserError(f"the process that renders chat templates did not start: {printable(error)}") from None

    def _template_message(self, source: str) -> bytes:
        """Return the number of a template, with its source if the worker does not have it."""
        if source in self._numbers:
            return json.dumps({"template": self._numbers[source]}).encode()
        number = self._numbers[source] = len(self._numbers)
        return json.dumps({"template": number, "source": source}).encode()

    def _send(self, content: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(_REPLY_TIMEOUT_S)
        self._socket.sendall(len(content).to_bytes(8) + content)

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        length = int.from_bytes(self._receive_bytes(8, deadline))
        if length > _MAX_REPLY_BYTES:
            raise ConnectionError("the reply is too long")
        return json.loads(self._receive_bytes(length, deadline))

    def _receive_bytes(self, num_bytes: int, deadline: float) -> bytearray:
        assert self._socket is not None
        received = bytearray(num_bytes)
        rest = memoryview(received)
        while rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            count = self._socket.recv_into(rest)
            if count == 0:
                raise ConnectionError("it ended")
            rest = rest[count:]
        return received

    def _stop(self, wait: float = 0.0) -> str:
        """End the process, if it does not end in `wait` seconds; return how it ended, as a clause for a message."""
        if self._socket is not None:
            self._socket.close()
        popen, self._popen = self._popen, None
        if popen is None or self._owner != os.getpid():
            return "it was not rendered"
        try:
            popen.wait(wait)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
            return f"rendering takes more than {_REPLY_TIMEOUT_S:g} s"
        if popen.returncode == -signal.SIGPROF:
            return "rendering takes more than 5 s of processor time"
        return f"rendering makes the interpreter crash (exit status {popen.returncode})"

    def close(self) -> None:
        self._stop(wait=1.0)


_process = _Process()
atexit.register(_process.close)
