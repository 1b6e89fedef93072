"""A connection of every process to process 0, open from before jax starts until the end: who is gone is known at once.

jax's own heartbeats notice a dead process after their time limit and name its number; a broken collective names a socket.
These connections carry no tensor. They break when a process ends, and the system's keepalive breaks them when its host
does; process 0 then tells all others who it was. They also carry what the preflight compares and the results of other
groups of hosts. Messages are JSON, one a line. No jax.
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
from qwen_dist.hosts.cluster import Cluster

Message = dict[str, Any]
# A host that does not answer probes for so long is taken for dead.
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_PROBES = 10, 5, 4
GREETING = "qwen-dist"
_RETRY_S = 0.25
# How long an end waits for the others to have read why.
_LAST_WORDS_S = 1.0


class Wire:
    """One connection: whole messages in both directions."""

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
        """Raises OSError when the other end is gone."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float | None = None) -> Message | None:
        """The next message; None at the end. Raises TimeoutError (deadline is of time.monotonic), OSError, ValueError."""
        while b"\n" not in self._received:
            self._socket.settimeout(None if deadline is None else max(0.01, deadline - time.monotonic()))
            part = self._socket.recv(1 << 16)
            if not part:
                return None
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def half_close(self) -> None:
        """Say that nothing more comes; what was sent still arrives."""
        with contextlib.suppress(OSError):  # it is gone already, which is what was wanted
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def meet(cluster: Cluster, facts: Message, timeout_s: float) -> tuple[dict[int, Wire], dict[int, Message]]:
    """Bring all processes together; each gives its facts, and process 0 gets those of all.

    Returns:
      The wires by process (process 0: one to each of the others; the others: one, to 0) and the facts by process
      (elsewhere than on process 0 only its own).

    Raises:
      UserError: naming host and port, within `timeout_s`, when the processes do not find each other.
    """
    deadline = time.monotonic() + timeout_s
    if cluster.process_id == 0:
        return _gather(cluster, facts, deadline, timeout_s)
    return {0: _reach(cluster, facts, deadline, timeout_s)}, {cluster.process_id: facts}


def _gather(
    cluster: Cluster, facts: Message, deadline: float, timeout_s: float
) -> tuple[dict[int, Wire], dict[int, Message]]:
    wires: dict[int, Wire] = {}
    known, problems = {0: facts}, list[str]()
    with _listen(cluster) as listener:
        while len(known) < cluster.num_processes and not problems:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, (address, *_) = listener.accept()
            except TimeoutError:
                problems.append(_missing(cluster, known, timeout_s))
                break
            wire = Wire(connection)
            try:
                hello = wire.receive(min(deadline, time.monotonic() + 5.0))
            except (OSError, ValueError):
                hello = None
            if hello is None or hello.get("greeting") != GREETING:
                wire.close()  # a port scanner, or a health check
                continue
            process, theirs = hello["process"], hello["facts"] | {"address": address}
            if hello["num_processes"] != cluster.num_processes or not 0 < process < cluster.num_processes:
                problems.append(
                    f"process {process} on {theirs['host']} was started as one of {hello['num_processes']} processes and "
                    f"process 0 on {facts['host']} as one of {cluster.num_processes}: start all with the same number."
                )
            elif process in known:
                problems.append(
                    f"{theirs['host']} and {known[process]['host']} both say that they are process {process} of "
                    f"{cluster.num_processes}: give each process its own number."
                )
                wire.send({"verdict": problems, "roster": {}})
                wire.close()
                continue
            wires[process], known[process] = wire, theirs
    if problems:
        tell(wires, {"verdict": problems, "roster": {}})
        raise UserError("preflight: " + " ".join(problems))
    return wires, known


def tell(wires: Mapping[int, Wire], message: Message) -> None:
    """Send to all that still listen."""
    for wire in wires.values():
        with contextlib.suppress(OSError):  # whoever is gone cannot be told
            wire.send(message)


def _missing(cluster: Cluster, known: Mapping[int, Message], timeout_s: float) -> str:
    missing = sorted(set(range(cluster.num_processes)) - known.keys())
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
    advice = "is the command running on every host, and does the firewall let the port through?"
    if cluster.is_loopback:
        advice = (
            f"{cluster.host} is a loopback address, which only processes on {known[0]['host']} itself can reach: give a "
            "name or an address of this host on the network."
        )
    return (
        f"{who} of {cluster.num_processes} did not come to {known[0]['host']} ({cluster.coordinator}) within "
        f"{timeout_s:.0f} s: {advice}"
    )


def _listen(cluster: Cluster) -> socket.socket:
    """A listening socket on the coordinator's port: loopback if that is its address, else every interface."""
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


def _reach(cluster: Cluster, facts: Message, deadline: float, timeout_s: float) -> Wire:
    """Connect to process 0, which may come later."""
    failure: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            wire = Wire(socket.create_connection((cluster.host, cluster.port), timeout=min(left, 10.0)))
            hello = {"greeting": GREETING, "process": cluster.process_id, "num_processes": cluster.num_processes}
            wire.send(hello | {"facts": facts})
            return wire
        except OSError as error:
            failure = error
            time.sleep(min(_RETRY_S, max(0.0, deadline - time.monotonic())))
    raise UserError(
        f"preflight: process {cluster.process_id} on {facts['host']} cannot reach process 0 at {cluster.coordinator} "
        f"within {timeout_s:.0f} s: {_why(cluster, failure)}"
    )


def _why(cluster: Cluster, failure: OSError | None) -> str:
    if isinstance(failure, socket.gaierror):
        return f"the name {cluster.host} cannot be resolved; give an address, or put the name into DNS."
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


class Lifeline:
    """Watches the wires from a thread: when another process is gone or has failed, this one says so and ends.

    names: "process 3 on host-b" by process. `inbox` has, on process 0, what others `send`.
    """

    def __init__(self, process: int, wires: Mapping[int, Wire], names: Sequence[str]):
        self._process, self._wires, self._names = process, wires, names
        self._lock, self._done = threading.Lock(), threading.Event()
        self._finished: set[int] = set()
        self.inbox: queue.Queue[Message] = queue.Queue()
        for other, wire in wires.items():
            threading.Thread(target=self._watch, args=(other, wire), daemon=True, name=f"lifeline-{other}").start()

    def send(self, message: Message) -> None:
        """To process 0, which finds it in its inbox. Raises OSError when process 0 is gone."""
        self._wires[0].send({"to_inbox": message})

    def _watch(self, other: int, wire: Wire) -> None:
        while True:
            try:
                message = wire.receive()
            except (OSError, ValueError):
                message = None
            if message is None:
                if other not in self._finished:
                    self._end(f"{self._names[other]} is gone: it was killed, has crashed, or its host is down.")
                return
            if "stop" in message:
                self._end(message["stop"])
            elif "to_inbox" in message:
                self.inbox.put(message["to_inbox"])
            elif "finished" in message:
                with self._lock:
                    self._finished.add(other)
                if len(self._finished) == len(self._wires):
                    self._done.set()

    def finish(self) -> None:
        """Wait until all processes have come here: from then on their ends are expected.

        There is no time limit, because groups of hosts may finish hours apart; one that dies ends the wait.
        """
        if self._process != 0:
            tell(self._wires, {"finished": self._process})
        self._done.wait()
        if self._process == 0:
            tell(self._wires, {"finished": 0})

    def fail(self, reason: str, details: str = "") -> NoReturn:
        """End this process and all others; the reason is printed by all of them, `details` here only.

        A process that fails because another one died learns from the wire who that was, a moment later: it waits for that.
        """
        time.sleep(_LAST_WORDS_S)
        print(details, end="", file=sys.stderr)
        self._end(f"{self._names[self._process]} failed: {reason}")

    def _end(self, reason: str) -> NoReturn:
        with self._lock:  # never released: the first reason is the one
            print(f"qwen-dist: {self._names[self._process]} stops: {reason}", file=sys.stderr, flush=True)
            tell(self._wires, {"stop": reason})
            for wire in self._wires.values():
                wire.half_close()
            if self._process == 0:
                time.sleep(_LAST_WORDS_S)  # an end with unread input resets a connection and loses what was sent
            sys.stdout.flush()
            os._exit(1)
