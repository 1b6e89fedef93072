"""An interactive chat in a terminal: lines, commands that begin with a slash, and Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence

from qwen_dist.errors import UserError, printable, printable_lines

Messages = list[dict[str, str]]
COMMANDS = ("/help", "/clear", "/system", "/exit", "/quit")
_HELP = """\
/help          this list
/clear         forget the conversation
/system TEXT   set the system message and forget the conversation; without TEXT, remove it
/exit, /quit   end the chat, as do Ctrl-D and an empty line
A line that ends with \\ continues on the next one; lines between two \"\"\" are one message. Ctrl-C stops an answer."""
_QUOTES = '"""'


class ChatSession:
    """A conversation with a model.

    Args:
      encode: returns the tokens of a prompt from the messages.
      respond: prints the answer to these tokens and returns its text.
      max_context: tokens that the conversation may have.
      system: the system message.
    """

    def __init__(
        self,
        encode: Callable[[Messages], Sequence[int]],
        respond: Callable[[Sequence[int]], str],
        max_context: int,
        system: str | None = None,
    ):
        self._encode, self._respond, self._max_context = encode, respond, max_context
        self._messages = system_messages(system)

    def run(self, model: str) -> int:
        """Chat until the user ends it; return the exit code."""
        with contextlib.suppress(ImportError):  # line editing and history, where Python has them
            import readline  # noqa: F401
        _note(f"Chat with {printable(model)}; context {self._max_context} tokens.")
        _note("Chat. An empty line or Ctrl-D ends it; Ctrl-C stops an answer; /help lists the commands.")
        while True:
            try:
                text = _read_message()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                _note("\n(line cleared; Ctrl-D or /exit ends the chat)")
                continue
            if not text.strip() or text.strip() in ("/exit", "/quit"):
                return 0
            if text.startswith("/"):
                self._run_command(text)
            else:
                self._answer(text)

    def _run_command(self, text: str) -> None:
        command, _, argument = text.strip().partition(" ")
        if command == "/help":
            _note(_HELP)
        elif command in ("/clear", "/system"):
            kept = [message for message in self._messages if message["role"] == "system"]
            self._messages = kept if command == "/clear" else system_messages(argument.strip() or None)
            _note("(the conversation is empty)")
        else:
            _note(f"{printable(command, 60)} is not a command; there are {', '.join(COMMANDS)}")

    def _answer(self, text: str) -> None:
        before = list(self._messages)
        self._messages.append({"role": "user", "content": text})
        try:
            answer = self._respond(self._encode(self._messages))
            self._messages.append({"role": "assistant", "content": answer})
            if sys.stderr.isatty():
                self._show_context_left()
        except KeyboardInterrupt:
            _note("\n(stopped)")
            self._messages = before
        except UserError as error:
            _note(printable_lines(error))
            self._messages = before

    def _show_context_left(self) -> None:
        try:
            left = self._max_context - len(self._encode(self._messages))
        except UserError:  # the conversation is longer than the context
            left = 0
        _note(f"[{max(left, 0)} of {self._max_context} tokens of context left]")


def system_messages(text: str | None) -> Messages:
    """Return the messages that a conversation with this system message begins with."""
    return [] if text is None else [{"role": "system", "content": text}]


def _read_message() -> str:
    """Read a line, or several that belong together. Raises EOFError and KeyboardInterrupt."""
    text = input("\n> ")
    if text.lstrip().startswith(_QUOTES):
        text = text.lstrip().removeprefix(_QUOTES)
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + input(". ")
        return text.rstrip().removesuffix(_QUOTES)
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(". ")
    return text


def _note(text: str) -> None:
    print(text, file=sys.stderr)
