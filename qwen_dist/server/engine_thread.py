"""The thread that runs the engine: loads the model, compiles the programs, and then runs steps while there are requests.

Only this thread touches the engine. Others queue requests and aborts; outputs go to the event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from qwen_dist.engine.engine import EngineStats
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams
from qwen_dist.tokenizer import Tokenizer

# How often the engine's load is published while it works.
_STATS_EVERY_S = 0.1


class ServedEngine(Protocol):
    """What a server needs of an `Engine`, or of a `followers.LeadingEngine`."""

    @property
    def is_idle(self) -> bool: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def max_context(self) -> int: ...
    def check(self, request: Request) -> None: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request: Request) -> None: ...
    def step(self) -> list[RequestOutput]: ...


class OpenedModel(NamedTuple):
    """An engine that is ready for requests, and with it what `engine.open.open_engine` returns."""

    engine: ServedEngine
    tokenizer: Tokenizer
    defaults: SamplingParams


class EngineThread(threading.Thread):
    """Runs the engine.

    Args:
      open_model: loads the model and compiles its programs.
      loop: runs the callbacks.
      on_ready: called with the model when requests can come.
      on_outputs: called with the outputs of each step.
      on_failure: called with the error that ended the thread.

    Attributes:
      stats: the engine's load a moment ago; None before it is ready.
    """

    def __init__(
        self,
        open_model: Callable[[], OpenedModel],
        loop: asyncio.AbstractEventLoop,
        *,
        on_ready: Callable[[OpenedModel], None],
        on_outputs: Callable[[Sequence[RequestOutput]], None],
        on_failure: Callable[[BaseException], None],
    ):
        super().__init__(name="engine", daemon=True)
        self._open_model, self._loop = open_model, loop
        self._on_ready, self._on_outputs, self._on_failure = on_ready, on_outputs, on_failure
        self._commands: queue.SimpleQueue[tuple[Literal["add", "abort", "stop"], Sequence[Request]]] = queue.SimpleQueue()
        self._is_stopping = False
        self._stats_time = 0.0
        self.stats: EngineStats | None = None

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests that have passed `Engine.check`."""
        self._commands.put(("add", tuple(requests)))

    def abort(self, requests: Sequence[Request]) -> None:
        """Drop requests: no output follows. Those that have finished are ignored."""
        self._commands.put(("abort", tuple(requests)))

    def stop(self) -> None:
        """End the thread after the step that runs."""
        self._is_stopping = True
        self._commands.put(("stop", ()))

    def run(self) -> None:
        try:
            model = self._open_model()
            self._publish_stats(model.engine)
            self._call(self._on_ready, model)
            while not self._is_stopping:
                self._take_commands(model.engine)
                self._run_step(model.engine)
        except BaseException as error:
            self._call(self._on_failure, error)

    def _take_commands(self, engine: ServedEngine) -> None:
        """Take all commands, and wait for one if there is nothing to compute."""
        while not self._is_stopping:
            try:
                command, requests = self._commands.get(block=engine.is_idle)
            except queue.Empty:
                return
            for request in requests:
                if command == "add":
                    engine.add_request(request)
                else:
                    engine.abort(request)
            if engine.is_idle:
                self._publish_stats(engine)

    def _run_step(self, engine: ServedEngine) -> None:
        if self._is_stopping:
            return
        outputs = engine.step()
        if outputs:
            self._call(self._on_outputs, outputs)
        if engine.is_idle or time.monotonic() - self._stats_time > _STATS_EVERY_S:
            self._publish_stats(engine)

    def _publish_stats(self, engine: ServedEngine) -> None:
        self.stats, self._stats_time = engine.stats, time.monotonic()

    def _call(self, function: Callable, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and with it the server
            self._is_stopping = True
