"""The control channel: a connection of every process to process 0, open from before jax starts until the end. No jax.

It tells every process at once when another one is gone: jax's heartbeats need their whole timeout and then give only a
process number, and a broken collective only names a socket. A connection breaks when its process ends, and TCP keepalive
breaks it when the host is down; process 0 then tells all others which process it was. The channel also carries what the
preflight compares and the batch results of other replicas, but no tensors. Messages are JSON, one per line.

Anybody can connect to the port of process 0. A connection that does not begin with the greeting of a process of this run is
closed, and process 0 waits for the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qwen_dist.errors import UserError, printable, printable_lines
from qwen_dist.json_reader import parse_json
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.preflight import is_host_info

Message = dict[str, Any]
# A host that does not answer keepalive probes for this long counts as down.
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_PROBES = 10, 5, 4
GREETING = "qwen-dist"
# A greeting has a few kilobytes, the result of the preflight the names of all processes; the largest message is the result
# of a record with the log-probabilities of its prompt.
MAX_GREETING_BYTES, MAX_PREFLIGHT_BYTES, MAX_MESSAGE_BYTES = 2**18, 2**24, 2**30
GREETING_TIMEOUT_S = 5.0
# Connections that have not sent their greeting yet; more wait in the queue of the system.
_MAX_WAITING = 256
# The most refusals that are printed and kept.
_MAX_REFUSALS = 5
_RETRY_S = 0.25
# How long a process waits before it exits, so that the others can read the reason.
_EXIT_DELAY_S = 1.0


class Connection:
    """A TCP connection that sends and receives whole messages."""

    def __init__(self, connection: socket.socket):
        self._socket, self._lock, self._received = connection, threading.Lock(), bytearray()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
            ("TCP_KEEPINTVL", KEEPALIVE_EVERY_S),
            ("TCP_KEEPCNT", KEEPALIVE_PROBES),
            ("TCP_USER_TIMEOUT", 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_EVERY_S * KEEPALIVE_PROBES)),
        ):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError when the other end is gone."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float | None = None, max_bytes: int | None = None) -> Message | None:
        """Return the next message, or None when the other end has closed the connection.

        Args:
          deadline: in seconds of `time.monotonic`; None waits without a limit.
          max_bytes: of the message; None allows `MAX_MESSAGE_BYTES`.

        Raises:
          TimeoutError: there was no message before the deadline.
          OSError: the connection is broken.
          ValueError: what was received is not a JSON object of at most `max_bytes`.
        """
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            if not self.receive_some(max_bytes or MAX_MESSAGE_BYTES):
                return None
        return self._take_message(end)

    def receive_some(self, max_bytes: int) -> bool:
        """Wait for bytes of a message; return False when the other end has closed the connection.

        Raises:
          OSError: the connection is broken.
          ValueError: the message has more than `max_bytes` bytes.
        """
        data = self._socket.recv(1 << 16)
        self._received += data
        if len(self._received) > max_bytes:
            raise ValueError(f"a message of more than {max_bytes} bytes")
        return bool(data)

    def received_message(self) -> Message | None:
        """Return the next message if all of it has been received. Raises ValueError as `receive` does."""
        end = self._received.find(b"\n")
        return None if end < 0 else self._take_message(end)

    def _take_message(self, end: int) -> Message:
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        message = parse_json(line)
        if not isinstance(message, dict):
            raise ValueError("a message is a JSON object")
        return message

    def fileno(self) -> int:
        return self._socket.fileno()

    def half_close(self) -> None:
        """Close the sending direction; what was sent still arrives."""
        with contextlib.suppress(OSError):  # already closed
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def rendezvous(cluster: Cluster, host_info: Message, timeout_s: float) -> tuple[dict[int, Connection], dict[int, Message]]:
    """Connect all processes to process 0 and send it the host info of each.

    Returns:
      The connections by process id (on process 0 one to each other process, elsewhere one to process 0), and the host infos
      by process id (on process 0 those of all processes, elsewhere only this process's).

    Raises:
      UserError: naming host and port, within `timeout_s`, when the processes do not find each other.
    """
    deadline = time.monotonic() + timeout_s
    if cluster.process_id == 0:
        return _accept_all(cluster, host_info, deadline, timeout_s)
    return {0: _connect(cluster, host_info, deadline, timeout_s)}, {cluster.process_id: host_info}


def _accept_all(
    cluster: Cluster, host_info: Message, deadline: float, timeout_s: float
) -> tuple[dict[int, Connection], dict[int, Message]]:
    connections: dict[int, Connection] = {}
    host_infos, refusals = {0: host_info}, list[str]()
    with _listen(cluster) as listener, contextlib.closing(_Greetings(listener)) as greetings:
        while len(host_infos) < cluster.num_processes:
            if time.monotonic() >= deadline:
                problem = _describe_missing(cluster, host_infos, timeout_s)
                problem += f" Refused meanwhile: {' '.join(refusals)}" if refusals else ""
                broadcast(connections, {"problems": [problem]})
                raise UserError(f"preflight: {problem}")
            for connection, address, hello in greetings.next(deadline):
                if refusal := _check_greeting(hello, cluster, host_infos):
                    if refusal not in refusals and len(refusals) < _MAX_REFUSALS:
                        print(f"qwen-dist: refused a process at {address}: {refusal}", file=sys.stderr, flush=True)
                        refusals.append(refusal)
                    broadcast({0: connection}, {"problems": [refusal]})
                    connection.close()
                else:
                    process = hello["process"]
                    connections[process], host_infos[process] = connection, hello["host_info"] | {"address": address}
    return connections, host_infos


def _check_greeting(hello: Message, cluster: Cluster, host_infos: Mapping[int, Message]) -> str:
    """Return why a process cannot take part, in one sentence, or an empty string."""
    process, theirs = hello.get("process"), hello.get("host_info")
    num_processes, host = hello.get("num_processes"), host_infos[0]["host"]
    if type(process) is not int or type(num_processes) is not int or theirs is None or not is_host_info(theirs):
        return (
            f"process 0 on {host} does not understand the greeting of this process: install the same version of qwen-dist "
            "on all hosts."
        )
    theirs_host = printable(theirs["host"], 100)
    if num_processes != cluster.num_processes or not 0 < process < cluster.num_processes:
        return (
            f"process {process} on {theirs_host} was started as one of {num_processes} processes and process 0 on {host} "
            f"as one of {cluster.num_processes}: start all with the same number."
        )
    if process in host_infos:
        return (
            f"{theirs_host} and {printable(host_infos[process]['host'], 100)} both have process id {process} of "
            f"{cluster.num_processes}: give each process a different one."
        )
    return ""


class _Greetings:
    """Accepts connections and receives their greetings, from all of them at once. Others than greetings are closed."""

    def __init__(self, listener: socket.socket):
        self._listener, self._selector = listener, selectors.DefaultSelector()
        # (address, deadline) of every connection that has not sent its greeting, the oldest first.
        self._waiting: dict[Connection, tuple[str, float]] = {}
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def next(self, deadline: float) -> list[tuple[Connection, str, Message]]:
        """Wait for something to happen; return the connections, with address, whose greeting is now received."""
        now = time.monotonic()
        for connection in [one for one, (_, end) in self._waiting.items() if end <= now]:
            self._drop(connection)  # a port scanner, or a health check
        until = min([deadline, *(end for _, end in self._waiting.values())])
        found = []
        for key, _ in self._selector.select(max(0.01, until - now)):
            if key.fileobj is self._listener:
                self._accept()
            elif (greeting := self._read(key.data)) is not None:
                found.append((key.data, self._waiting.pop(key.data)[0], greeting))
                self._selector.unregister(key.data)
        self._set_listening(len(self._waiting) < _MAX_WAITING)
        return found

    def close(self) -> None:
        for connection in list(self._waiting):
            self._drop(connection)
        self._selector.close()

    def _accept(self) -> None:
        try:
            accepted, (address, *_) = self._listener.accept()
            connection = Connection(accepted)
        except OSError:  # it was closed meanwhile
            return
        self._waiting[connection] = (address, time.monotonic() + GREETING_TIMEOUT_S)
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> Message | None:
        try:
            is_open = connection.receive_some(MAX_GREETING_BYTES)
            greeting = connection.received_message()
            is_stranger = not is_open if greeting is None else greeting.get("greeting") != GREETING
        except (OSError, ValueError):
            is_stranger = True
        if is_stranger:
            self._drop(connection)
            return None
        return greeting

    def _drop(self, connection: Connection) -> None:
        del self._waiting[connection]
        self._selector.unregister(connection)
        connection.close()

    def _set_listening(self, wanted: bool) -> None:
        if wanted == (self._listener in {key.fileobj for key in self._selector.get_map().values()}):
            return
        if wanted:
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._selector.unregister(self._listener)


def broadcast(connections: Mapping[int, Connection], message: Message) -> None:
    """Send a message to every process that is still connected."""
    for connection in connections.values():
        with contextlib.suppress(OSError):  # this process is gone
            connection.send(message)


def _describe_missing(cluster: Cluster, host_infos: Mapping[int, Message], timeout_s: float) -> str:
    missing = sorted(set(range(cluster.num_processes)) - host_infos.keys())
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
    advice = "is the command running on every host, and does the firewall let the port through?"
    if cluster.is_loopback:
        advice = (
            f"{cluster.host} is a loopback address, which only processes on {host_infos[0]['host']} itself can reach: give "
            "a name or an address of this host on the network."
        )
    return (
        f"{who} of {cluster.num_processes} did not connect to {host_infos[0]['host']} ({cluster.coordinator}) within "
        f"{timeout_s:.0f} s: {advice}"
    )


def _listen(cluster: Cluster) -> socket.socket:
    """Listen on the coordinator's port: on loopback if that is its address, else on every interface."""
    host = socket.gethostname()
    try:
        family = socket.AF_INET6 if ":" in cluster.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((cluster.host if cluster.is_loopback else "", cluster.port))
        listener.listen(4096)
    except OSError as error:
        raise UserError(
            f"preflight: process 0 on {host} cannot listen on port {cluster.port}: {error.strerror}; choose another port "
            f"for the coordinator (from {cluster.source})."
        ) from None
    return listener


def _connect(cluster: Cluster, host_info: Message, deadline: float, timeout_s: float) -> Connection:
    """Connect to process 0, retrying because it may start later than this process."""
    failure: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = Connection(socket.create_connection((cluster.host, cluster.port), timeout=min(left, 10.0)))
            hello = {"greeting": GREETING, "process": cluster.process_id, "num_processes": cluster.num_processes}
            connection.send(hello | {"host_info": host_info})
            return connection
        except OSError as error:
            failure = error
            time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
    raise UserError(
        f"preflight: process {cluster.process_id} on {host_info['host']} cannot reach process 0 at {cluster.coordinator} "
        f"within {timeout_s:.0f} s: {_explain(cluster, failure)}"
    )


def _explain(cluster: Cluster, failure: OSError | None) -> str:
    """Return the likely cause of a failed connection and what to do about it."""
    if isinstance(failure, socket.gaierror):
        return f"the name {cluster.host} cannot be resolved; give an address, or add the name to DNS."
    if cluster.is_loopback:
        return (
            f"{cluster.host} is a loopback address, and on this host nothing listens there; if process 0 is on another "
            "host, give its name or address on the network."
        )
    if isinstance(failure, TimeoutError):
        return f"no answer; a firewall drops port {cluster.port}, or the host is down. Open the port between the hosts."
    if isinstance(failure, ConnectionRefusedError):
        return f"refused; process 0 is not running there, or a firewall rejects port {cluster.port}."
    return f"{failure.strerror if failure is not None else 'no attempt was possible'}."


class ControlChannel:
    """Ends this process, with the reason, as soon as another process is gone or has failed. One thread per connection.

    Args:
      process_id: of this process.
      connections: by process id, from `rendezvous`.
      names: of all processes, such as "process 3 on host-b (pid 7)".

    Attributes:
      messages: on process 0, what others have sent with `send`; on the others, what process 0 has sent with `broadcast`.
    """

    def __init__(self, process_id: int, connections: Mapping[int, Connection], names: Sequence[str]):
        self._process_id, self._connections, self._names = process_id, connections, names
        self._lock, self._done = threading.Lock(), threading.Event()
        self._finished: set[int] = set()
        self.messages: queue.Queue[Message] = queue.Queue()
        for other, connection in connections.items():
            name = f"control-channel-{other}"
            threading.Thread(target=self._watch, args=(other, connection), daemon=True, name=name).start()

    def send(self, message: Message) -> None:
        """Put a message into the `messages` of process 0. Raises OSError when process 0 is gone."""
        self._connections[0].send({"message": message})

    def broadcast(self, message: Message) -> None:
        """On process 0, put a message into the `messages` of all other processes."""
        broadcast(self._connections, {"message": message})

    def _watch(self, other: int, connection: Connection) -> None:
        while True:
            try:
                received = connection.receive()
            except (OSError, ValueError):
                received = None
            if received is None:
                if other not in self._finished:
                    self._terminate(f"{self._names[other]} is gone: it was killed, has crashed, or its host is down.")
                return
            if "stop" in received:
                self._terminate(received["stop"])
            elif "message" in received:
                self.messages.put(received["message"])
            elif "finished" in received:
                with self._lock:
                    self._finished.add(other)
                if len(self._finished) == len(self._connections):
                    self._done.set()

    def finish(self) -> None:
        """Wait until all processes have called this; after that a closed connection is not an error.

        There is no timeout: replicas may finish hours apart, and a process that dies ends the wait.
        """
        if self._process_id != 0:
            broadcast(self._connections, {"finished": self._process_id})
        self._done.wait()
        if self._process_id == 0:
            broadcast(self._connections, {"finished": 0})

    def fail(self, reason: str, details: str = "") -> NoReturn:
        """End this process and all others. All print `reason`; only this one prints `details`.

        It waits a moment first: if this process failed because another one died, the channel reports that as the reason.
        """
        time.sleep(_EXIT_DELAY_S)
        print(details, end="", file=sys.stderr)
        self._terminate(f"{self._names[self._process_id]} failed: {reason}")

    def _terminate(self, reason: str) -> NoReturn:
        with self._lock:  # never released: only the first reason is reported
            print(
                f"qwen-dist: {self._names[self._process_id]} stops: {printable_lines(reason)}", file=sys.stderr, flush=True
            )
            broadcast(self._connections, {"stop": reason})
            for connection in self._connections.values():
                connection.half_close()
            if self._process_id == 0:
                time.sleep(_EXIT_DELAY_S)  # exiting with unread input resets the connections and loses what was sent
            sys.stdout.flush()
            os._exit(1)
