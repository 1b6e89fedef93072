"""Chat templates: the text of a conversation, where each message is in it, and how the template opens and ends turns.

What a template leaves out is found by rendering the chat a second time, with a mark in every message, tool and call: each
mark must come out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_dist.chat import Chat, alternatives, make_chat
from qwen_dist.errors import UserError, printable
from qwen_dist.template_process import render

# A mark is these digits and a number of 8 digits. It is random, so that no message or template has it.
_MARK = f"{secrets.randbelow(10**20):020}"
_MARK_PATTERN = re.compile(f"{_MARK}[0-9]{{8}}")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TurnFormat:
    """How a template writes the assistant's turns.

    Attributes:
      generation_prompt: what it appends to have the assistant answer, such as `<|im_start|>assistant\\n<think>\\n`.
      opening: the part of that with which every turn of the assistant begins.
      ending: what it writes after the last answer of a chat, such as `<|im_end|>\\n`.
    """

    generation_prompt: str
    opening: str
    ending: str


class ChatTemplate:
    """The chat template of a checkpoint.

    Args:
      source: in jinja2.
      tokens: the names and texts of the special tokens that it can write, such as `eos_token`.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        self._source = source
        self._tokens = dict(tokens)
        self._turn_formats: dict[str, TurnFormat] = {}
        self._has_noted_developer = False

    def check_variables(self, names: Iterable[str]) -> None:
        """Raise UserError if the template does not use one of these variables: setting it would change nothing."""
        unused = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", self._source)]
        if unused:
            raise UserError(
                f"the chat template does not use {', '.join(printable(name, 60) for name in unused)}; leave it out"
            )

    def mentions(self, text: str) -> bool:
        """Return whether the template's source has this text."""
        return text in self._source

    def render(self, chat: Chat, add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation.

        Args:
          chat: the conversation.
          add_generation_prompt: end with the start of the assistant's turn.

        Raises:
          UserError: the template rejects the chat, leaves a part of it out, or does not use one of the variables.
          CheckpointError: the template is broken.
        """
        return self._render_complete(chat, add_generation_prompt)[1]

    def render_with_ends(self, chat: Chat) -> tuple[str, list[int]]:
        """Return the text of a conversation, and where in it the content of each message ends; 0 for an empty content.

        Raises:
          UserError: as `render`, or the place of a content cannot be found.
          CheckpointError: the template is broken.
        """
        chat, text = self._render_complete(chat, False)
        every = [index for index, message in enumerate(chat.messages) if (message.get("content") or "").strip()]
        (marked,) = self._render_all([_inputs(_mark_contents(chat, every), False)])
        ends = [0] * len(chat.messages)
        if _MARK_PATTERN.sub("", marked) == text:
            for number, place in enumerate(_MARK_PATTERN.finditer(marked)):
                ends[_mark_index(place[0])] = place.start() - number * len(place[0])
            return text, ends
        # The template looks into the contents, so each is marked alone.
        one_each = self._render_all([_inputs(_mark_contents(chat, [index]), False) for index in every])
        for index, marked in zip(every, one_each, strict=True):
            after = marked.rpartition(_mark(index))[2]
            if not text.endswith(after):
                raise UserError(f"messages[{index}]: its place in the text of the chat template cannot be found")
            ends[index] = len(text) - len(after)
        return text, ends

    def turn_format(self, variables: Mapping[str, Any]) -> TurnFormat:
        """Return how the template writes the assistant's turns with these variables.

        Raises:
          UserError: it has no generation prompt, or does not begin the assistant's turns with it.
          CheckpointError: the template is broken.
        """
        key = json.dumps(variables, sort_keys=True)
        if key not in self._turn_formats:
            self._turn_formats[key] = self._find_turn_format(variables)
        return self._turn_formats[key]

    def _find_turn_format(self, variables: Mapping[str, Any]) -> TurnFormat:
        turns = [{"role": role, "content": _mark(i)} for i, role in enumerate(("user", "assistant") * 2)]
        question, chat = (make_chat(messages, None, variables) for messages in (turns[:1], turns))
        before, asked, text = self._render_all([_inputs(question, False), _inputs(question, True), _inputs(chat, False)])
        prompt = asked.removeprefix(before)
        if not asked.startswith(before) or not prompt:
            raise UserError("the chat template has no generation prompt, so the targets of training cannot be found")
        *_, first, _, second, ending = _MARK_PATTERN.split(text) if len(_MARK_PATTERN.findall(text)) == 4 else [""] * 5
        length = next((n for n in range(len(prompt), 0, -1) if prompt[:n] in first and prompt[:n] in second), 0)
        opening = prompt[:length]
        if not opening or not (opening == prompt or first.endswith(opening) or second.endswith(opening)):
            raise UserError("the chat template does not begin the assistant's turns with its generation prompt")
        return TurnFormat(prompt, opening, ending)

    def _render_complete(self, chat: Chat, add_generation_prompt: bool) -> tuple[Chat, str]:
        """Return the first form of the chat that the template renders with nothing left out, and its text."""
        self.check_variables(chat.variables)
        problem: UserError | None = None
        for form in alternatives(chat):
            marked, places = _mark_all(form)
            text, marked_text = self._try([_inputs(form, add_generation_prompt), _inputs(marked, add_generation_prompt)])
            if isinstance(text, str):
                # A template may refuse the marks; then there is no such check.
                lost = self._lost(marked_text, places, chat.variables) if isinstance(marked_text, str) else []
                if not lost:
                    self._note_developer(chat, form)
                    return form, text
                shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
                text = UserError(f"the chat template does not write {shown}: leave it out, or change it")
            problem = problem or text
        assert problem is not None
        raise problem

    def _lost(self, marked_text: str, places: Mapping[str, str], variables: Mapping[str, Any]) -> list[str]:
        """Return the places whose marks are not in the text.

        Templates of thinking models leave out the reasoning of earlier turns. That is right, unless they write none at all.
        """
        written = set(_MARK_PATTERN.findall(marked_text))
        lost = [place for mark, place in places.items() if mark not in written]
        if any(place.endswith("reasoning_content") for place in lost) and self._writes_reasoning(variables):
            lost = [place for place in lost if not place.endswith("reasoning_content")]
        return lost

    def _writes_reasoning(self, variables: Mapping[str, Any]) -> bool:
        answer = {"role": "assistant", "content": "a", "reasoning_content": _mark(0)}
        chat = make_chat([{"role": "user", "content": "q"}, answer], None, variables)
        (text,) = self._try([_inputs(chat, False)])
        return isinstance(text, str) and _mark(0) in text

    def _note_developer(self, chat: Chat, form: Chat) -> None:
        if self._has_noted_developer or not any(m["role"] == "developer" for m in chat.messages):
            return
        if all(m["role"] != "developer" for m in form.messages):
            self._has_noted_developer = True
            _log.warning("the chat template does not write the role developer: these messages are given the role system")

    def _render_all(self, inputs: Sequence[dict[str, Any]]) -> list[str]:
        texts = self._try(inputs)
        for text in texts:
            if isinstance(text, UserError):
                raise text
        return [text for text in texts if isinstance(text, str)]

    def _try(self, inputs: Sequence[dict[str, Any]]) -> list[str | UserError]:
        defaults = {"tools": None, "documents": None, **self._tokens}
        return render(self._source, [defaults | each for each in inputs])


def _inputs(chat: Chat, add_generation_prompt: bool) -> dict[str, Any]:
    return {
        **chat.variables,
        "messages": chat.messages,
        "tools": chat.tools,
        "add_generation_prompt": add_generation_prompt,
    }


def _mark(index: int) -> str:
    return f"{_MARK}{index:08}"


def _mark_index(mark: str) -> int:
    return int(mark.removeprefix(_MARK))


def _append(text: str, mark: str) -> str:
    """Put a mark at the end of a text, before the white space, which templates may strip."""
    end = len(text.rstrip())
    return text[:end] + mark + text[end:]


def _mark_contents(chat: Chat, indices: Iterable[int]) -> Chat:
    """Return the chat with a mark, of the message's number, at the end of the content of these messages."""
    messages = list(chat.messages)
    for index in indices:
        messages[index] = messages[index] | {"content": _append(messages[index]["content"], _mark(index))}
    return chat.with_messages(messages)


def _mark_all(chat: Chat) -> tuple[Chat, dict[str, str]]:
    """Return the chat with a mark in everything that a template has to write, and for each mark where it is."""
    places: dict[str, str] = {}

    def new_mark(place: str) -> str:
        mark = _mark(len(places))
        places[mark] = place
        return mark

    def marked_function(function: Mapping[str, Any], place: str) -> dict[str, Any]:
        changed = {**function, "name": function["name"] + new_mark(place)}
        if isinstance(arguments := function.get("arguments"), Mapping):
            changed["arguments"] = {**arguments, new_mark(f"the arguments of {place}"): ""}
        return changed

    messages = []
    for index, message in enumerate(chat.messages):
        changed, place = dict(message), f"messages[{index}]"
        for key in ("content", "reasoning_content"):
            if (message.get(key) or "").strip():
                what = f"{place} (role {message['role']!r})" if key == "content" else f"{place}.{key}"
                changed[key] = _append(message[key], new_mark(what))
        if "tool_calls" in message:
            changed["tool_calls"] = [
                call | {"function": marked_function(call["function"], f"{place}.tool_calls[{number}]")}
                for number, call in enumerate(message["tool_calls"])
            ]
        messages.append(changed)
    tools = []
    for index, tool in enumerate(chat.tools or ()):
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            changed = marked_function(function, f"tools[{index}]")
            tool = tool | {"function": changed} if "function" in tool else changed
        tools.append(tool)
    marked = dataclasses.replace(chat.with_messages(messages), tools=tuple(tools) or None)
    return marked, places
