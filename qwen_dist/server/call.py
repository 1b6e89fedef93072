"""From the body of an HTTP request to requests to the engine, and their outputs as they come. No jax."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_dist.chat import make_chat
from qwen_dist.engine.embeddings import embedding_request
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams, StructuredOutputs
from qwen_dist.errors import UserError, printable
from qwen_dist.json_reader import JsonError, parse_json
from qwen_dist.openai_api import ApiRequest, begins_with_reasoning, make_requests, parse_body, shortened
from qwen_dist.server.answer_parser import AnswerParser, ToolParameters, tool_parameters
from qwen_dist.server.embeddings import EmbeddingsRequest, parse_embeddings_body
from qwen_dist.server.errors import ApiError, invalid_request
from qwen_dist.server.tool_grammar import forced_call
from qwen_dist.tokenizer import Tokenizer

# Of one body: prompts times answers to each.
MAX_ANSWERS = 1024


@dataclasses.dataclass(frozen=True)
class CallBody:
    """What a body asks for.

    Attributes:
      requests: one for each prompt; a chat is one.
      adapter: the name of the adapter that they use; empty for none.
      fields: the names that the body has.
      stream: send the answer as it comes.
      include_usage: end the stream with the numbers of tokens.
      forced_tool: the tool that must be called; "" for any, None if none must.
      one_tool_call: report only the first call of a tool.
    """

    requests: tuple[ApiRequest, ...]
    adapter: str = ""
    fields: frozenset[str] = frozenset()
    stream: bool = False
    include_usage: bool = False
    forced_tool: str | None = None
    one_tool_call: bool = False

    @property
    def is_chat(self) -> bool:
        return self.requests[0].messages is not None

    @property
    def num_answers(self) -> int:
        return sum(request.num_choices for request in self.requests)


def parse_call_body(raw: bytes, *, is_chat: bool, models: Sequence[str]) -> CallBody:
    """Parse a body strictly: what cannot be honoured is an error.

    Args:
      raw: the body.
      is_chat: whether it is one of chats, or of texts to complete.
      models: the names of the model that is served, and of its adapters.

    Raises:
      ApiError: it cannot be used.
    """
    body = _parse_object(raw)
    name = body.get("model")
    check_model(name, models)
    try:
        return _parse(dict(body), is_chat=is_chat, model=name or models[0], adapter=_adapter(name, models))
    except UserError as error:
        raise invalid_request(error, body) from None


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        body = parse_json(raw)
    except JsonError as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object; it is {printable(shortened(body), 100)}", "invalid_request")
    return body


def check_model(name: Any, models: Sequence[str]) -> None:
    """Raise ApiError if a name is given that no model of the server has."""
    if isinstance(name, str) and name not in models:
        served = printable(", ".join(map(repr, models)))
        message = f"there is no model {printable(repr(name), 80)}; this server has {served}"
        raise ApiError(404, message, "model_not_found", param="model")


def _adapter(name: str | None, models: Sequence[str]) -> str:
    """Return the adapter of a body with this model: the first of the models is the one without."""
    return "" if name is None or name == models[0] else name


def _parse(body: dict[str, Any], *, is_chat: bool, model: str, adapter: str) -> CallBody:
    fields = frozenset(body)
    stream, include_usage = _parse_stream(body)
    tool_choice, one_call = _parse_tool_choice(body) if is_chat else (None, False)
    prompts = [body] if is_chat else [body | {"prompt": prompt} for prompt in _prompts(body.get("prompt"))]
    requests = tuple(dataclasses.replace(parse_body(one, is_chat=is_chat), model=model) for one in prompts)
    call = CallBody(requests, adapter, fields, stream, include_usage, tool_choice, one_call)
    if call.num_answers > MAX_ANSWERS:
        raise UserError(f"n times the number of prompts is {call.num_answers}; it must be at most {MAX_ANSWERS}")
    if stream and requests[0].echo and "logprobs" in requests[0].params:
        raise UserError("echo with logprobs cannot be streamed: leave one of echo, logprobs and stream out")
    return call


def _parse_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    """Take the fields of streaming out of a body."""
    stream, options = body.pop("stream", None), body.pop("stream_options", None)
    if not isinstance(stream, bool | None):
        raise UserError(f"stream must be true or false; got {shortened(stream)}")
    if options is None:
        return bool(stream), False
    if not stream:
        raise UserError("stream_options needs stream: true")
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise UserError(f'stream_options must be an object such as {{"include_usage": true}}; got {shortened(options)}')
    if not all(isinstance(value, bool | None) for value in options.values()):
        raise UserError(f"stream_options must have the values true or false; got {shortened(options)}")
    if options.get("include_obfuscation"):
        raise UserError("stream_options cannot have include_obfuscation: leave it out")
    return True, bool(options.get("include_usage"))


def _parse_tool_choice(body: dict[str, Any]) -> tuple[str | None, bool]:
    """Take from a chat's body the choice that `parse_body` does not know, and whether only one call may follow."""
    parallel, choice = body.get("parallel_tool_calls"), body.get("tool_choice")
    if not isinstance(parallel, bool | None):
        raise UserError(f"parallel_tool_calls must be true or false; got {shortened(parallel)}")
    one_call = parallel is False
    if choice is None or choice in ("none", "auto"):
        return None, one_call
    tools = body.get("tools") or []
    names = tool_parameters(tools) if isinstance(tools, list) else {}
    del body["tool_choice"]
    if not names:
        raise UserError("tool_choice needs tools")
    if choice == "required":
        return "", one_call
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": "…"}}; got '
            f"{shortened(choice)}"
        )
    if function["name"] not in names:
        raise UserError(f"tool_choice names {shortened(function['name'])}; tools has {printable(', '.join(names), 200)}")
    return function["name"], one_call


def _prompts(prompt: Any) -> list[Any]:
    """Return the prompts of a body: a text, token ids, or a list of these."""
    is_list = isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)
    if is_list and len(prompt) > MAX_ANSWERS:
        raise UserError(f"prompt has {len(prompt)} prompts; at most {MAX_ANSWERS} can be in one body")
    return prompt if is_list else [prompt]


class Call:
    """A body that is being answered. Used by the event loop only.

    Attributes:
      requests: to the engine, in the order of the answers; the key of each is the call and its index.
      prompt_tokens: of all prompts, each counted once.
      num_open: the requests that have not finished.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.prompt_tokens = 0
        self.num_open = 0
        self._outputs: asyncio.Queue[tuple[int, RequestOutput] | ApiError] = asyncio.Queue()

    def start(self, requests: Sequence[Request], adapter: str) -> None:
        """Take the requests of the answers, in order."""
        self.requests = [dataclasses.replace(one, key=(self, index), adapter=adapter) for index, one in enumerate(requests)]
        self.num_open = len(self.requests)

    def deliver(self, index: int, output: RequestOutput) -> None:
        """Take an output of the request with this index."""
        self.num_open -= output.finish_reason is not None
        self._outputs.put_nowait((index, output))

    def fail(self, error: ApiError) -> None:
        """End the call: what waits for outputs gets this error."""
        self._outputs.put_nowait(error)

    async def outputs(self) -> list[tuple[int, RequestOutput]]:
        """Wait for outputs, and return all that there are. Raises ApiError if the call has failed."""
        items = [await self._outputs.get()]
        while not self._outputs.empty():
            items.append(self._outputs.get_nowait())
        for item in items:
            if isinstance(item, ApiError):
                raise item
        return [item for item in items if not isinstance(item, ApiError)]


class TextCall(Call):
    """A chat, or texts to complete; `body` is what is asked for."""

    def __init__(self, body: CallBody, tools: ToolParameters | None):
        super().__init__()
        self.body, self._tools = body, tools
        self.is_thinking = False
        self.beginning = ""

    def new_parser(self) -> AnswerParser:
        """Return the parser of one answer to a chat."""
        is_forced = self.body.forced_tool is not None
        parser = AnswerParser(self._tools, is_thinking=self.is_thinking, is_forced=is_forced)
        parser.push(self.beginning)
        return parser


class EmbeddingsCall(Call):
    """Texts to embed; `body` is what is asked for."""

    def __init__(self, body: EmbeddingsRequest):
        super().__init__()
        self.body = body


def make_embeddings_call(raw: bytes, models: Sequence[str], tokenizer: Tokenizer, max_context: int) -> EmbeddingsCall:
    """Return the call of a body of embeddings. Raises ApiError if it cannot be used."""
    body = _parse_object(raw)
    name = body.get("model")
    check_model(name, models)
    try:
        wanted = parse_embeddings_body(body, name or models[0])
        requests = [embedding_request(None, text, tokenizer, max_context) for text in wanted.inputs]
    except UserError as error:
        raise invalid_request(error, body) from None
    call = EmbeddingsCall(wanted)
    call.start(requests, _adapter(name, models))
    call.prompt_tokens = sum(len(request.prompt) for request in requests)
    return call


def make_call(
    body: CallBody,
    tokenizer: Tokenizer,
    defaults: SamplingParams,
    *,
    max_context: int,
    variables: Mapping[str, Any],
    has_seed: bool,
) -> TextCall:
    """Return the call of a body, with its requests to the engine.

    Args:
      body: parsed.
      tokenizer: of the checkpoint.
      defaults: sampling parameters, overridden by the body's own.
      max_context: the most tokens of prompt and answer.
      variables: of the chat template, for chats that do not set them.
      has_seed: whether `defaults` fixes the seed; otherwise a body without one gets a random one.

    Raises:
      UserError: it cannot be answered.
    """
    tools = body.requests[0].tools if body.is_chat else None
    call = TextCall(body, tool_parameters(make_chat(body.requests[0].messages, tools).tools or ()) if tools else None)
    for api in body.requests:
        if "seed" not in api.params and not has_seed:
            api = dataclasses.replace(api, params={**api.params, "seed": secrets.randbelow(2**63)})
        requests = make_requests(api, tokenizer, defaults, int, max_context=max_context, variables=variables)
        call.requests += requests
        call.prompt_tokens += len(requests[0].prompt)
    if body.is_chat:
        call.is_thinking = begins_with_reasoning(call.requests[0].prompt, tokenizer)
        if body.forced_tool is not None:
            _force_tool(call, body.forced_tool, tokenizer, variables)
    call.start(call.requests, body.adapter)
    return call


def _force_tool(call: TextCall, tool: str, tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
    """Begin the answer with the call of a tool, as a part of the prompt, and hold the rest to the schema of the tool."""
    api = call.body.requests[0]
    chat = make_chat(api.messages, api.tools, api.chat_template_kwargs, variables)
    forced = forced_call(
        chat.tools or (),
        tool or None,
        is_xml=tokenizer.chat_template(chat).mentions("<function="),
        is_thinking=call.is_thinking,
        one_call=call.body.one_tool_call,
    )
    call.beginning = forced.beginning
    ids = tuple(tokenizer.encode(forced.beginning, add_special_tokens=False))
    form = StructuredOutputs(grammar=forced.grammar)
    call.requests = [
        dataclasses.replace(
            request, prompt=request.prompt + ids, params=request.params.override({"structured_outputs": form})
        )
        for request in call.requests
    ]
    call.prompt_tokens += len(ids)
