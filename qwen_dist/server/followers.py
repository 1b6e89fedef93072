"""Serving as several processes: process 0 has the clients, and the others follow it, so that all run the same steps.

A step depends only on the requests that were added and aborted before it. Before each step process 0 sends these commands
through the control channel. The followers apply them to their own engines, run the step and drop its outputs. So all
processes run the same programs in the same order, which collectives require.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from qwen_dist.engine.engine import Engine, EngineStats
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams
from qwen_dist.runtime.control import ControlChannel


class LeadingEngine:
    """An engine on process 0 that repeats every command to the followers. It has the methods of `ServedEngine`.

    Args:
      engine: computes the answers.
      control: to the followers.
    """

    def __init__(self, engine: Engine, control: ControlChannel):
        self._engine, self._control = engine, control
        self._commands: list[dict[str, Any]] = []  # since the last step
        self._counter = itertools.count()
        self._numbers: dict[int, int] = {}  # of the requests that are answered, by identity

    @property
    def is_idle(self) -> bool:
        return self._engine.is_idle

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def max_context(self) -> int:
        return self._engine.max_context

    def check(self, request: Request) -> None:
        self._engine.check(request)

    def add_request(self, request: Request) -> None:
        self._engine.add_request(request)
        number = self._numbers[id(request)] = next(self._counter)
        self._commands.append({"add": number, "request": request_fields(request)})

    def abort(self, request: Request) -> None:
        number = self._numbers.pop(id(request), None)
        if number is not None:
            self._engine.abort(request)
            self._commands.append({"abort": number})

    def step(self) -> list[RequestOutput]:
        self._control.broadcast({"step": self._commands})
        self._commands = []
        outputs = self._engine.step()
        for output in outputs:
            if output.finish_reason is not None:
                del self._numbers[id(output.request)]
        return outputs


def follow(engine: Engine, control: ControlChannel) -> None:
    """Run the steps of process 0 until it stops. SIGTERM or Ctrl-C requests that; a second one ends this process."""
    requests: dict[int, Request] = {}
    _request_stop_on_signals(control)
    while "stop" not in (message := control.messages.get()):
        for command in message["step"]:
            if "add" in command:
                number = command["add"]
                requests[number] = make_request(number, command["request"])
                engine.add_request(requests[number])
            else:
                engine.abort(requests.pop(command["abort"]))
        for output in engine.step():
            if output.finish_reason is not None:
                del requests[output.request.key]


def stop_followers(control: ControlChannel) -> None:
    """End `follow` on the other processes. Called on process 0 after its last step."""
    control.broadcast({"stop": True})


def handle_stop_requests(control: ControlChannel, stop: Callable[[], object]) -> None:
    """Call `stop` whenever a follower asks process 0 to stop. Does not return, so run it in a daemon thread."""
    while "request_stop" in control.messages.get():
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            stop()


def _request_stop_on_signals(control: ControlChannel) -> None:
    has_requested = False

    def request_stop(number: int, frame: object) -> None:
        nonlocal has_requested
        if has_requested:
            os.write(2, b"stopped\n")
            os._exit(128 + number)
        has_requested = True
        with contextlib.suppress(OSError):  # process 0 is gone, and the channel ends this process
            control.send({"request_stop": True})

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)


def request_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a request, except its key, as values that JSON has."""
    params = {name: value for name, value in dataclasses.asdict(request.params).items() if value is not None}
    fields = {"prompt": request.prompt, "params": params}
    return fields | {"adapter": request.adapter, "is_embedding": request.is_embedding}


def make_request(key: Any, fields: Mapping[str, Any]) -> Request:
    """Return the request with this key and the fields of `request_fields`, also after a round trip through JSON."""
    fields = {name: _with_tuples(value) for name, value in fields.items()}
    return Request(key, **fields | {"params": SamplingParams(**fields["params"])})


def _with_tuples(value: Any) -> Any:
    """Return JSON with tuples in place of lists."""
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return {name: _with_tuples(one) for name, one in value.items()} if isinstance(value, dict) else value
