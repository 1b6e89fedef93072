"""The rendezvous: a real process gets in, whatever strangers send to the port of process 0 before and meanwhile."""

import contextlib
import json
import queue
import re
import socket
import threading
import time

import pytest

from qwen_dist.errors import UserError
from qwen_dist.runtime import control, preflight
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.distributed import _run_preflight


@pytest.fixture(scope="module")
def host_info():
    return preflight.collect_host_info(
        {"mesh": ""}, checkpoint="", inputs=(), write_dirs=["/"], memory_per_checkpoint_byte=0
    )


@pytest.fixture
def main_process(port, host_info, monkeypatch):
    """A function (timeout_s) that starts process 0 of 2 and returns a queue for the result of its rendezvous."""
    monkeypatch.setattr(control, "GREETING_TIMEOUT_S", 0.5)
    threads = []

    def start(timeout_s=20.0):
        results = queue.Queue()

        def run():
            try:
                results.put(control.rendezvous(Cluster(f"127.0.0.1:{port}", 2, 0, "flags"), host_info, timeout_s))
            except UserError as error:
                results.put(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return results

    yield start
    for thread in threads:
        thread.join()


def connect(port):
    """Connect to process 0, which may not listen yet."""
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        time.sleep(0.02)
    raise AssertionError("process 0 does not listen")


def greeting(**changes):
    return {"greeting": control.GREETING, "process": 1, "num_processes": 2} | changes


def finish(port, host_info, results):
    """Connect as process 1 and check that the rendezvous succeeds."""
    cluster = Cluster(f"127.0.0.1:{port}", 2, 1, "flags")
    ours, _ = control.rendezvous(cluster, host_info, 10.0)
    connections, host_infos = results.get(timeout=10)
    assert host_infos[1] == host_info | {"address": "127.0.0.1"}
    connections[1].send({"problems": []})
    assert ours[0].receive(time.monotonic() + 5) == {"problems": []}
    for connection in (*ours.values(), *connections.values()):
        connection.close()


STRANGERS = {
    "list": b"[]\n",
    "number": b"5\n",
    "null": b"null\n",
    "empty line": b"\n",
    "no JSON": b"\x00\xff\xfe\n",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "deep": b"[" * 100_000 + b"\n",
    "deep object": b'{"greeting":' * 50_000 + b"\n",
    "long number": b'{"greeting": ' + b"1" * 10_000 + b"}\n",
    "no greeting": b"{}\n",
    "another greeting": b'{"greeting": ["qwen-dist"]}\n',
    "endless": b"x" * 2**20,
}


@pytest.mark.parametrize("sent", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_disconnected(main_process, port, host_info, sent):
    results = main_process()
    with connect(port) as stranger:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(sent)
            assert stranger.recv(100) == b""
        finish(port, host_info, results)


FALSE_GREETINGS = {
    "no process": ({"process": None}, "does not understand the greeting"),
    "process 0": ({"process": 0}, "start all with the same number"),
    "process 2": ({"process": 2}, "start all with the same number"),
    "negative": ({"process": -1}, "start all with the same number"),
    "text": ({"process": "1"}, "does not understand the greeting"),
    "boolean": ({"process": True}, "does not understand the greeting"),
    "other number": ({"num_processes": 3}, "was started as one of 3 processes and process 0 on .* as one of 2"),
    "no facts": ({"host_info": {}}, "does not understand the greeting"),
    "facts of a wrong type": ({"host_info": []}, "does not understand the greeting"),
}


@pytest.mark.parametrize(("changes", "message"), FALSE_GREETINGS.values(), ids=FALSE_GREETINGS)
def test_a_process_that_does_not_fit_learns_why_and_the_wait_goes_on(
    main_process, port, host_info, capfd, changes, message
):
    results = main_process()
    refused = control.Connection(connect(port))
    refused.send(greeting(host_info=host_info) | changes)
    (problem,) = refused.receive(time.monotonic() + 5)["problems"]
    assert refused.receive(time.monotonic() + 5) is None
    refused.close()
    finish(port, host_info, results)
    assert re.search(message, problem)
    assert f"qwen-dist: refused a process at 127.0.0.1: {problem}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["host", "pid", "versions", "settings", "memory", "disk"])
@pytest.mark.parametrize("value", [None, 5, [], {}, {"x": None}, {"qwen-dist": "1", "jax": 2}, "missing"])
def test_what_is_a_host_info(host_info, name, value):
    assert preflight.is_host_info(host_info)
    odd = host_info | {name: value}
    if value == "missing":
        del odd[name]
    is_one = (name, value) in [("pid", 5), ("settings", {}), ("disk", {})]
    assert preflight.is_host_info(odd) == is_one
    if is_one:
        preflight.find_problems(Cluster("127.0.0.1:1", 2, 0, ""), {0: host_info, 1: odd})


def test_many_silent_and_slow_connections_do_not_keep_a_process_out(main_process, port, host_info):
    results = main_process()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(port)) for _ in range(control._MAX_WAITING + 20)]
        slow = stack.enter_context(connect(port))
        slow.sendall(b"x")
        finish(port, host_info, results)
        assert len(silent) > control._MAX_WAITING


def test_bytes_without_a_newline_do_not_extend_the_wait(main_process, port):
    start = time.monotonic()
    results = main_process(1.0)
    with connect(port) as stranger:
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 5:
                stranger.sendall(b"x")
                time.sleep(0.05)
        assert "process 1 of 2 did not connect" in str(results.get(timeout=5))
    assert time.monotonic() - start < 4


def test_the_message_at_the_end_names_who_was_refused(main_process, port, host_info):
    results = main_process(1.0)
    for _ in range(2):
        refused = control.Connection(connect(port))
        refused.send(greeting(host_info=host_info, num_processes=4))
        assert refused.receive(time.monotonic() + 5)
        refused.close()
    message = str(results.get(timeout=5))
    assert "did not connect" in message and message.count("was started as one of 4 processes") == 1


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"problems": []},
        {"problems": [], "names": ["a"]},
        {"problems": [], "names": [1, 2]},
        {"problems": [5]},
        {"names": ["a", "b"]},
        {"problems": "x", "names": ["a", "b"]},
    ],
)
def test_what_is_a_result_of_the_preflight(result):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = control.Connection(socket.create_connection(listener.getsockname()))
        near = control.Connection(listener.accept()[0])
    far.send(result)
    with pytest.raises(UserError, match="is not process 0 of this run"):
        _run_preflight(Cluster("127.0.0.1:1", 2, 1, "flags"), {0: near}, {}, 5.0)
    near.close()
    far.close()


@pytest.mark.parametrize("sent", [b"x" * 5000, b'{"a": ', json.dumps({"a": "x" * 5000}).encode() + b"\n"])
def test_a_message_has_a_limit_and_a_deadline(sent, monkeypatch):
    monkeypatch.setattr(control, "MAX_MESSAGE_BYTES", 1000)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        far = socket.create_connection(listener.getsockname())
        near = control.Connection(listener.accept()[0])
    far.sendall(sent)
    with pytest.raises(TimeoutError if len(sent) < 1000 else ValueError):
        near.receive(time.monotonic() + 0.2)
    near.close()
    far.close()
