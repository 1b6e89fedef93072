"""The control channel: a connection of every process to process 0, open from before jax starts until the end. No jax.

It tells every process at once when another one is gone: jax's heartbeats need their whole timeout and then give only a
process number, and a broken collective only names a socket. A connection breaks when its process ends, and TCP keepalive
breaks it when the host is down; process 0 then tells all others which process it was. The channel also carries what the
preflight compares and the batch results of other replicas, but no tensors. Messages are JSON, one per line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qwen_dist.errors import UserError
from qwen_dist.runtime.cluster import Cluster

Message = dict[str, Any]
# A host that does not answer keepalive probes for this long counts as down.
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_PROBES = 10, 5, 4
GREETING = "qwen-dist"
_RETRY_S = 0.25
# How long a process waits before it exits, so that the others can read the reason.
_EXIT_DELAY_S = 1.0


class Connection:
    """A TCP connection that sends and receives whole messages."""

    def __init__(self, connection: socket.socket):
        self._socket, self._lock, self._received = connection, threading.Lock(), b""
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

    def receive(self, deadline: float | None = None) -> Message | None:
        """Return the next message, or None when the other end has closed the connection.

        Args:
          deadline: in seconds of `time.monotonic`; None waits without a limit.

        Raises:
          TimeoutError: there was no message before the deadline.
          OSError: the connection is broken.
          ValueError: what was received is not JSON.
        """
        while b"\n" not in self._received:
            self._socket.settimeout(None if deadline is None else max(0.01, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

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
    host_infos, problems = {0: host_info}, list[str]()
    with _listen(cluster) as listener:
        while len(host_infos) < cluster.num_processes and not problems:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                accepted, (address, *_) = listener.accept()
            except TimeoutError:
                problems.append(_describe_missing(cluster, host_infos, timeout_s))
                break
            connection = Connection(accepted)
            try:
                hello = connection.receive(min(deadline, time.monotonic() + 5.0))
            except (OSError, ValueError):
                hello = None
            if hello is None or hello.get("greeting") != GREETING:
                connection.close()  # a port scanner, or a health check
                continue
            process, theirs = hello["process"], hello["host_info"] | {"address": address}
            if hello["num_processes"] != cluster.num_processes or not 0 < process < cluster.num_processes:
                problems.append(
                    f"process {process} on {theirs['host']} was started as one of {hello['num_processes']} processes and "
                    f"process 0 on {host_info['host']} as one of {cluster.num_processes}: start all with the same number."
                )
            elif process in host_infos:
                problems.append(
                    f"{theirs['host']} and {host_infos[process]['host']} both have process id {process} of "
                    f"{cluster.num_processes}: give each process a different one."
                )
                connection.send({"problems": problems})
                connection.close()
                continue
            connections[process], host_infos[process] = connection, theirs
    if problems:
        broadcast(connections, {"problems": problems})
        raise UserError("preflight: " + " ".join(problems))
    return connections, host_infos


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
      messages: on process 0, what other processes have sent with `send`.
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
            print(f"qwen-dist: {self._names[self._process_id]} stops: {reason}", file=sys.stderr, flush=True)
            broadcast(self._connections, {"stop": reason})
            for connection in self._connections.values():
                connection.half_close()
            if self._process_id == 0:
                time.sleep(_EXIT_DELAY_S)  # exiting with unread input resets the connections and loses what was sent
            sys.stdout.flush()
            os._exit(1)
