"""The answers of the API as JSON: whole bodies, and the chunks of a stream. No jax."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_dist.engine.request import RequestOutput
from qwen_dist.openai_api import (
    PendingAnswer,
    TextOffsets,
    completion_body,
    completion_logprobs,
    echoed_text,
    logprob_json,
)
from qwen_dist.server.answer_parser import AnswerPart, joined
from qwen_dist.server.call import TextCall
from qwen_dist.tokenizer import Tokenizer

END_OF_STREAM = b"data: [DONE]\n\n"


def new_id(*, is_chat: bool) -> str:
    return f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class WholeAnswer:
    """Collects the outputs of a call for one body."""

    def __init__(self, call: TextCall, tokenizer: Tokenizer):
        self._call = call
        self._answers = [PendingAnswer(api, tokenizer) for api in call.body.requests]
        self._places = _places(call)

    def add(self, index: int, output: RequestOutput) -> None:
        prompt, choice = self._places[index]
        self._answers[prompt].add(choice, output)

    def body(self) -> dict[str, Any]:
        """Return the body, when all answers are finished."""
        call, all_choices = self._call, [answer.in_order() for answer in self._answers]
        number = secrets.token_hex(12)
        bodies = [
            completion_body(api, choices, answer.num_prompt_tokens, number)
            for api, choices, answer in zip(call.body.requests, all_choices, self._answers, strict=True)
        ]
        choices = [choice for body in bodies for choice in body["choices"]]
        for index, choice in enumerate(choices):
            choice["index"] = index
            if call.body.is_chat:
                self._divide(choice)
        completion_tokens = sum(body["usage"]["completion_tokens"] for body in bodies)
        cached_tokens = sum(body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies)
        numbers = usage(call.prompt_tokens, completion_tokens, cached_tokens)
        return bodies[0] | {"choices": choices, "usage": numbers}

    def _divide(self, choice: dict[str, Any]) -> None:
        """Divide the text of a chat's answer into reasoning, content and tool calls."""
        parser = self._call.new_parser()
        parts = parser.push(choice["message"]["content"]) + parser.finish()
        calls = [part for part in parts if part.kind == "tool_call"]
        calls = calls[:1] if self._call.body.one_tool_call else calls
        reasoning, content = joined(parts, "reasoning"), joined(parts, "content")
        choice["message"] |= {"content": content if content or not calls else None}
        if reasoning:
            choice["message"]["reasoning_content"] = reasoning
        if calls:
            choice["message"]["tool_calls"] = [_tool_call(call) for call in calls]
            choice["finish_reason"] = _finish_reason(choice["finish_reason"], has_calls=True)


class StreamedAnswer:
    """Turns the outputs of a call into the events of a stream."""

    def __init__(self, call: TextCall, tokenizer: Tokenizer):
        self._call, self._tokenizer = call, tokenizer
        is_chat = call.body.is_chat
        self._head = {
            "id": new_id(is_chat=is_chat),
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": call.body.requests[0].model,
        }
        echoes = [echoed_text(api, tokenizer) for api in call.body.requests for _ in range(api.num_choices)]
        new_choice = _ChatChoice if is_chat else _TextChoice
        self._choices = [new_choice(call, tokenizer, echo) for echo in echoes]
        self._completion_tokens = 0
        self._places, self._cached_tokens = _places(call), dict[int, int]()

    def add(self, index: int, output: RequestOutput) -> bytes:
        """Return the events of an output."""
        self._completion_tokens += len(output.tokens)
        if output.finish_reason is not None:  # as in `completion_body`, a prompt counts once
            prompt, _ = self._places[index]
            known = self._cached_tokens.get(prompt, output.num_cached_tokens)
            self._cached_tokens[prompt] = min(known, output.num_cached_tokens)
        return b"".join(self._event({"index": index} | choice) for choice in self._choices[index].add(output))

    def end(self) -> bytes:
        """Return the events after the last output."""
        if not self._call.body.include_usage:
            return END_OF_STREAM
        cached_tokens = sum(self._cached_tokens.values())
        numbers = usage(self._call.prompt_tokens, self._completion_tokens, cached_tokens)
        return event(self._head | {"choices": [], "usage": numbers}) + END_OF_STREAM

    def _event(self, choice: Mapping[str, Any]) -> bytes:
        no_usage = {"usage": None} if self._call.body.include_usage else {}
        return event(self._head | {"choices": [choice]} | no_usage)


class _TextChoice:
    """One answer to a text, in chunks."""

    def __init__(self, call: TextCall, tokenizer: Tokenizer, echo: str):
        self._tokenizer, self._echo, self._offsets = tokenizer, echo, TextOffsets()

    def add(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        text, self._echo = self._echo + output.text, ""
        logprobs = None
        if output.request.params.logprobs is not None:
            end = () if output.end_logprob is None else (output.end_logprob,)
            entries = [logprob_json(token, self._tokenizer) for token in (*output.logprobs, *end)]
            logprobs = completion_logprobs(entries, self._offsets)
        if text or logprobs or output.finish_reason is not None:
            yield {"text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}


class _ChatChoice:
    """One answer to a chat, in chunks."""

    def __init__(self, call: TextCall, tokenizer: Tokenizer, echo: str):
        self._tokenizer, self._parser = tokenizer, call.new_parser()
        self._one_call, self._num_calls, self._has_begun = call.body.one_tool_call, 0, False

    def add(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        if not self._has_begun:
            self._has_begun = True
            yield _chunk({"role": "assistant", "content": ""})
        parts = self._parser.push(output.text)
        if output.finish_reason is not None:
            parts += self._parser.finish()
        deltas = [delta for part in parts if (delta := self._delta(part))]
        logprobs = None
        if output.request.params.logprobs is not None:
            logprobs = {"content": [logprob_json(token, self._tokenizer) for token in output.logprobs], "refusal": None}
            deltas = deltas or [{}]  # the text of these tokens comes later
        for number, delta in enumerate(deltas):
            yield _chunk(delta, logprobs if number == 0 else None)
        if output.finish_reason is not None:
            yield _chunk({}, None, _finish_reason(output.finish_reason, has_calls=self._num_calls > 0))

    def _delta(self, part: AnswerPart) -> dict[str, Any]:
        if part.kind == "tool_call":
            if self._one_call and self._num_calls:
                return {}
            self._num_calls += 1
            return {"tool_calls": [{"index": self._num_calls - 1} | _tool_call(part)]}
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


def _chunk(
    delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _tool_call(part: AnswerPart) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _finish_reason(reason: str, *, has_calls: bool) -> str:
    return "tool_calls" if has_calls and reason == "stop" else reason


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _places(call: TextCall) -> list[tuple[int, int]]:
    """Return of each answer, by its index, which prompt it is of and its number among the answers to it."""
    return [(prompt, choice) for prompt, api in enumerate(call.body.requests) for choice in range(api.num_choices)]


def model_json(name: str, created: int, max_context: int, parent: str | None) -> dict[str, Any]:
    """Return the entry of a model, or of an adapter of the model `parent`."""
    model = {"id": name, "object": "model", "created": created, "owned_by": "qwen_dist", "max_model_len": max_context}
    return model | {"root": parent or name, "parent": parent}


def model_list(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(models)}
