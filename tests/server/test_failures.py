"""Servers that end before their time: an engine that fails, signals at any moment, and requests that take too long."""

import signal
import socket

import openai
import pytest
from running_server import running_server

from qwen_dist.server import http_server

FEW = ("--max-batch-size", "2", "--config.warm_up=false")
LONG = {"model": "demo", "prompt": "Count:", "max_tokens": 900, "extra_body": {"min_tokens": 900}}
# The command line with an engine whose 40th step fails.
FAILING = """
import itertools, sys
from qwen_dist.cli import main
from qwen_dist.engine.engine import Engine
step, numbers = Engine.step, itertools.count(1)
def failing_step(engine):
    if next(numbers) == 40:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return step(engine)
Engine.step = failing_step
sys.exit(main(sys.argv[1:]))
"""


def test_an_engine_that_fails_ends_the_server_with_one_line(tmp_path):
    with running_server(tmp_path, *FEW, program=("-c", FAILING)) as server:
        streams = [server.client().completions.create(stream=True, **LONG) for _ in range(2)]
        assert next(iter(streams[0])).choices[0].text
        for stream in streams:
            with pytest.raises(openai.APIError, match="the engine has ended with an error, and the server with it"):
                list(stream)
        assert server.process.wait(30) == 1
        lines = server.stderr.read_text().splitlines()
    assert "RESOURCE_EXHAUSTED: out of memory" in lines[-1] and lines[-1].startswith("qwen-dist serve: ")
    assert not any(line.startswith("Traceback") for line in lines)


def test_a_request_that_takes_too_long_and_a_second_signal(tmp_path):
    with running_server(tmp_path, *FEW, "--request-timeout", "1") as server:
        with pytest.raises(openai.InternalServerError, match="the answer was not finished within 1 s") as error:
            server.client().completions.create(**LONG)
        assert (error.value.status_code, error.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="the answer was not finished within 1 s"):
            list(server.client().completions.create(stream=True, **LONG))
        server.wait_for_metric("num_running", 0)
    with running_server(tmp_path, *FEW) as server:
        stream = server.client().completions.create(stream=True, **LONG)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("stopping: ")
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        with pytest.raises(openai.APIConnectionError):
            server.client().models.list()


def test_a_signal_while_the_model_is_loaded(tmp_path):
    with running_server(tmp_path, "--max-batch-size", "2", wait=False) as server:
        server.wait_for_line("compiling: 0 of ", seconds=120)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        lines = server.stderr.read_text().splitlines()
    assert lines[-1] == "stopped" and not any(line.startswith("ready: ") for line in lines)


def test_small_writes_are_sent_at_once():
    with http_server.bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
