"""What all HTTP requests share: the model, the calls that are being answered, and whether new ones are accepted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from qwen_dist.engine.request import RequestOutput
from qwen_dist.engine.structured_output import FormError
from qwen_dist.errors import UserError
from qwen_dist.server.call import Call, EmbeddingsCall, TextCall, make_call, make_embeddings_call, parse_call_body
from qwen_dist.server.engine_thread import EngineThread, OpenedModel, ServedEngine
from qwen_dist.server.errors import ApiError, invalid_request, not_ready
from qwen_dist.server.metrics import ServerMetrics
from qwen_dist.tokenizer import Tokenizer

AnyCall = TypeVar("AnyCall", bound=Call)
# Threads that parse bodies, render chats and tokenize.
_NUM_PARSERS = 4


@dataclasses.dataclass(frozen=True)
class ServiceLimits:
    """What is accepted.

    Attributes:
      max_body_bytes: of a request.
      max_open: answers that are computed or wait; more are refused.
      request_s: of a whole request, from its head to the end of the answer.
    """

    max_body_bytes: int
    max_open: int
    request_s: float


class Service:
    """Answers calls with the engine. Used by the event loop only.

    Args:
      open_model: loads the model and compiles its programs, in the engine's thread.
      name: of the model.
      adapters: names of adapters, which requests may give instead.
      limits: of requests.
      variables: of the chat template, for chats that do not set them.
      has_seed: whether the sampling parameters of the server fix the seed.
      on_ready, on_failure: called when the model can be used, and when the engine has ended with an error.
    """

    def __init__(
        self,
        open_model: Callable[[], OpenedModel],
        *,
        name: str,
        adapters: Sequence[str] = (),
        limits: ServiceLimits,
        variables: Mapping[str, Any],
        has_seed: bool,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ):
        self.name, self.limits, self.metrics = name, limits, ServerMetrics()
        self.names = (name, *adapters)
        self.created = int(time.time())
        self.model: OpenedModel | None = None
        self.is_draining = False
        self._variables, self._has_seed = dict(variables), has_seed
        self._on_ready, self._on_failure = on_ready, on_failure
        self._has_failed = False
        self._calls: dict[Call, float] = {}  # with the time of the last output
        self._num_open = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._parsers = concurrent.futures.ThreadPoolExecutor(_NUM_PARSERS, "parser")
        self.engine = EngineThread(
            open_model,
            asyncio.get_running_loop(),
            on_ready=self._ready,
            on_outputs=self._deliver,
            on_failure=self._fail,
        )

    # --- the state ---

    def check_ready(self) -> OpenedModel:
        """Return the model. Raises ApiError if requests are not accepted."""
        if self.is_draining:
            raise not_ready("the server is stopping and takes no new requests", "stopping")
        if self._has_failed:
            raise not_ready("the engine has ended with an error, and the server with it", "engine_failed")
        if self.model is None:
            raise not_ready("the model is being loaded; /health says when it is ready", "starting")
        return self.model

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model is not None
        return self.model.tokenizer

    async def drain(self, seconds: float) -> int:
        """Refuse new calls and wait for those that run; fail the rest. Return how many were not finished."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), seconds)
        except TimeoutError:
            left = list(self._calls)
            for call in left:
                call.fail(not_ready("the server stops before the answer is finished", "stopping"))
            return len(left)
        return 0

    def close(self) -> None:
        self.engine.stop()
        self._parsers.shutdown(wait=False, cancel_futures=True)

    # --- calls ---

    async def open_call(self, make: Callable[[OpenedModel], AnyCall]) -> AnyCall:
        """Make a call, in another thread, and start to answer it. Raises ApiError if it cannot be answered."""
        model = self.check_ready()
        loop = asyncio.get_running_loop()
        call = await loop.run_in_executor(self._parsers, make, model)
        self.check_room(len(call.requests))
        self._calls[call] = math.nan
        self._num_open += len(call.requests)
        self._is_idle.clear()
        self.metrics.prompt_tokens.inc(call.prompt_tokens)
        self.engine.add(call.requests)
        return call

    def close_call(self, call: Call) -> None:
        """Forget a call; what has not finished is dropped from the engine."""
        del self._calls[call]
        self._num_open -= len(call.requests)
        if call.num_open:
            self.engine.abort(call.requests)
        call.requests = []  # which name the call: no circle to collect
        if not self._calls:
            self._is_idle.set()

    def check_room(self, number: int = 1) -> None:
        """Raise ApiError if no call with so many answers is accepted."""
        self.check_ready()
        if self._num_open and self._num_open + number > self.limits.max_open:
            message = f"{self._num_open} answers are computed or wait, of at most {self.limits.max_open}; try again later"
            raise ApiError(429, message, "too_many_requests", headers={"Retry-After": "1"})

    # --- in another thread ---

    def make_text_call(self, model: OpenedModel, raw: bytes, is_chat: bool) -> TextCall:
        """Parse a body of a chat or of texts, render and tokenize."""
        body, engine = parse_call_body(raw, is_chat=is_chat, models=self.names), model.engine
        try:
            call = make_call(
                body,
                model.tokenizer,
                model.defaults,
                max_context=engine.max_context,
                variables=self._variables,
                has_seed=self._has_seed,
            )
            _check(call, engine, "messages" if is_chat else "prompt")
        except FormError as error:
            reason = error if body.forced_tool is None else UserError(f"tool_choice: {error}")
            raise invalid_request(reason, body.fields) from None
        except UserError as error:
            raise invalid_request(error, body.fields) from None
        return call

    def make_embeddings_call(self, model: OpenedModel, raw: bytes) -> EmbeddingsCall:
        """Parse a body of texts to embed, and tokenize."""
        call = make_embeddings_call(raw, self.names, model.tokenizer, model.engine.max_context)
        try:
            _check(call, model.engine, "input")
        except UserError as error:
            raise invalid_request(error, ()) from None
        return call

    # --- called by the engine's thread, through the loop ---

    def _ready(self, model: OpenedModel) -> None:
        self.model = model
        self._on_ready()

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            call, index = output.request.key
            last = self._calls.get(call)
            if last is None:  # closed meanwhile
                continue
            if len(call.requests) == 1 and not math.isnan(last):
                self.metrics.token_gap_s.observe(now - last)
            self._calls[call] = now
            self.metrics.generated_tokens.inc(len(output.tokens))
            if output.finish_reason is not None:
                self.metrics.cached_tokens.inc(output.num_cached_tokens)
            call.deliver(index, output)

    def _fail(self, error: BaseException) -> None:
        self._has_failed = True
        for call in self._calls:
            call.fail(ApiError(500, "the engine has ended with an error, and the server with it", "engine_failed"))
        self._on_failure(error)


def _check(call: Call, engine: ServedEngine, param: str) -> None:
    for request in call.requests:
        if len(request.prompt) >= engine.max_context:
            message = f"the prompt has {len(request.prompt)} tokens; the context of the model has "
            message += f"{engine.max_context}, which must also hold the answer"
            raise ApiError(400, message, "context_length_exceeded", param=param)
        engine.check(request)
