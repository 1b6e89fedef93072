"""The endpoints over HTTP: bodies within limits, keys, answers and streams, and clients that go away."""

from __future__ import annotations

import abc
import asyncio
import hmac
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_dist.engine.request import RequestOutput
from qwen_dist.errors import UserError, printable
from qwen_dist.failures import describe_failure
from qwen_dist.openai_api import CHAT_URL, TEXT_URL
from qwen_dist.server.answers import StreamedAnswer, WholeAnswer, model_json, model_list, to_json
from qwen_dist.server.answers import event as stream_event
from qwen_dist.server.call import EmbeddingsCall, TextCall, check_model
from qwen_dist.server.embeddings import EMBEDDINGS_URL, embeddings_body
from qwen_dist.server.engine_thread import OpenedModel
from qwen_dist.server.errors import ApiError, invalid_request
from qwen_dist.server.metrics import CONTENT_TYPE
from qwen_dist.server.service import AnyCall, Service

# A stream whose client reads no more is cut so long after its time is over.
_GRACE_S = 2.0


def make_app(service: Service, api_key: str | None) -> ASGIApp:
    """Return the application. With a key, every request but those of /health must have it."""

    async def health(request: Request) -> Response:
        service.check_ready()
        return _json({"status": "ok", "model": service.name})

    async def models(request: Request) -> Response:
        return _json(model_list([_model(service, name) for name in service.names]))

    async def model(request: Request) -> Response:
        check_model(request.path_params["name"], service.names)
        return _json(_model(service, request.path_params["name"]))

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(service.engine.stats), headers={"content-type": CONTENT_TYPE})

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route(CHAT_URL, TextEndpoint(service, CHAT_URL, is_chat=True), methods=["POST"]),
        Route(TEXT_URL, TextEndpoint(service, TEXT_URL, is_chat=False), methods=["POST"]),
        Route(EMBEDDINGS_URL, EmbeddingsEndpoint(service, EMBEDDINGS_URL), methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        ApiError: _on_error,
        HTTPException: _on_http_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app if api_key is None else KeyCheck(app, api_key)


def _model(service: Service, name: str) -> dict[str, Any]:
    parent = None if name == service.name else service.name
    return model_json(name, service.created, service.check_ready().engine.max_context, parent)


class KeyCheck:
    """Lets requests pass that have the key; the comparison takes the same time wherever they differ."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app, self._expected = app, b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the key is missing or wrong: send the header Authorization: Bearer KEY"
                error = ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _CallEndpoint(abc.ABC, Generic[AnyCall]):
    """Opens a call for each body, and answers it while its client is there and its time is not over."""

    def __init__(self, service: Service, url: str):
        self._service, self._url = service, url

    @abc.abstractmethod
    def _make(self, model: OpenedModel, raw: bytes) -> AnyCall:
        """Return the call of a body, in another thread. Raises ApiError if it cannot be answered."""

    @abc.abstractmethod
    async def _send(self, call: AnyCall, answer: HttpAnswer, start: float) -> None:
        """Send the answer of a call whose request came at `start`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = HttpAnswer(send)
        start = time.monotonic()
        try:
            call = await self._open(Request(scope, receive), start)
            try:
                await self._answer(call, receive, answer, start)
            finally:
                self._service.close_call(call)
        except ApiError as error:
            await answer.send_error(error)
        except ClientDisconnect:
            self._service.metrics.disconnects.inc()
            return
        except Exception as error:
            print(f"error while answering {self._url}: {describe_failure(error)}", file=sys.stderr, flush=True)
            await answer.send_error(ApiError(500, "the server has failed on this request", "internal_error"))
        self._service.metrics.answers.labels(self._url, answer.status).inc()

    async def _open(self, request: Request, start: float) -> AnyCall:
        limit = self._service.limits.request_s - (time.monotonic() - start)
        try:
            async with asyncio.timeout(limit):
                self._service.check_room()
                raw = await _read_body(request, self._service.limits.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limit:.0f} s", "timeout") from None
        return await self._service.open_call(lambda model: self._make(model, raw))

    async def _answer(self, call: AnyCall, receive: Receive, answer: HttpAnswer, start: float) -> None:
        """Answer a call; stop as soon as the client goes away, or after the time of a request."""
        seconds = self._service.limits.request_s
        work = asyncio.ensure_future(self._send(call, answer, start))
        gone = asyncio.ensure_future(_until_disconnect(receive))
        try:
            await asyncio.wait(
                {work, gone}, timeout=start + seconds - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if not work.done() and not gone.done():
                call.fail(ApiError(503, f"the answer was not finished within {seconds:g} s", "timeout"))
                await asyncio.wait({work}, timeout=_GRACE_S)
            if not work.done():
                raise ClientDisconnect
            await work
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        self._service.metrics.request_s.observe(time.monotonic() - start)

    async def _outputs(self, call: AnyCall, start: float) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        """Yield the outputs of a call as they come, until all of its requests have finished."""
        is_first, num_open = True, len(call.requests)
        while num_open:
            outputs = await call.outputs()
            if is_first:
                self._service.metrics.first_token_s.observe(time.monotonic() - start)
                is_first = False
            num_open -= sum(output.finish_reason is not None for _, output in outputs)
            yield outputs


class TextEndpoint(_CallEndpoint[TextCall]):
    """Answers chats, or texts to complete."""

    def __init__(self, service: Service, url: str, *, is_chat: bool):
        super().__init__(service, url)
        self._is_chat = is_chat

    def _make(self, model: OpenedModel, raw: bytes) -> TextCall:
        return self._service.make_text_call(model, raw, self._is_chat)

    async def _send(self, call: TextCall, answer: HttpAnswer, start: float) -> None:
        tokenizer = self._service.tokenizer
        whole, streamed = WholeAnswer(call, tokenizer), StreamedAnswer(call, tokenizer)
        async for outputs in self._outputs(call, start):
            if call.body.stream:
                await answer.send_part(b"".join(streamed.add(index, output) for index, output in outputs))
                continue
            for index, output in outputs:
                whole.add(index, output)
        if call.body.stream:
            await answer.send_part(streamed.end(), is_last=True)
        else:
            await answer.send_whole(_json(whole.body()))


class EmbeddingsEndpoint(_CallEndpoint[EmbeddingsCall]):
    """Embeds texts."""

    def _make(self, model: OpenedModel, raw: bytes) -> EmbeddingsCall:
        return self._service.make_embeddings_call(model, raw)

    async def _send(self, call: EmbeddingsCall, answer: HttpAnswer, start: float) -> None:
        embeddings: list[tuple[float, ...]] = [()] * len(call.requests)
        async for outputs in self._outputs(call, start):
            for index, output in outputs:
                embeddings[index] = output.embedding
        try:
            body = embeddings_body(call.body, embeddings, call.prompt_tokens)
        except UserError as error:
            raise invalid_request(error, ("dimensions",)) from None
        await answer.send_whole(_json(body))


class HttpAnswer:
    """One HTTP answer: whole, or a stream of events. `status` is 0 before it has begun."""

    def __init__(self, send: Send):
        self._send, self.status, self._has_ended = send, 0, False

    async def send_whole(self, response: Response) -> None:
        self.status, self._has_ended = response.status_code, True
        await response({"type": "http"}, _receive_nothing, self._send)

    async def send_part(self, content: bytes, *, is_last: bool = False) -> None:
        """Send events of a stream."""
        if not self.status:
            self.status = 200
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._has_ended = is_last
        await self._send({"type": "http.response.body", "body": content, "more_body": not is_last})

    async def send_error(self, error: ApiError) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun."""
        if not self.status:
            await self.send_whole(_error_response(error))
        elif not self._has_ended:
            await self.send_part(stream_event(error.body), is_last=True)


async def _receive_nothing() -> Any:
    raise AssertionError("an answer does not read")


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Read a body of JSON. Raises ApiError if it is too large or of another type, ClientDisconnect if it is cut."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json", "not_json")
    declared = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body has more than {max_bytes} bytes, which is the most that is read", "body_too_large")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise too_large
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    return _json(error.body, error.status, error.headers)


async def _on_error(request: Request, error: ApiError) -> Response:
    return _error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Answer an address or a method that does not exist."""
    path = printable(request.url.path, 100)
    if error.status_code == 405:
        message = f"{path} does not take the method {printable(request.method, 20)}"
        return _error_response(ApiError(405, message, "method_not_allowed", headers=dict(error.headers or {})))
    if error.status_code == 404:
        return _error_response(ApiError(404, f"there is no {path} here; chats are at {CHAT_URL}", "not_found"))
    return _error_response(ApiError(error.status_code, error.detail, "invalid_request"))
