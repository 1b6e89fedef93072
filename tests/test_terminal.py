"""A chat in a real terminal: a pseudo-terminal that is the controlling one of the process, so that Ctrl-C is a signal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from qwen_dist.cli import main
sys.exit(main(["generate", "--max-new-tokens", "8"]))
"""
CTRL_C = "\x03"


class Terminal:
    """What a person at the terminal does: type, and wait for a text."""

    def __init__(self):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        """Return the first match in what was written since the last one."""
        shown, deadline = "", time.monotonic() + seconds
        while (match := re.search(pattern, shown)) is None:
            ready, _, _ = select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no {pattern!r} in {shown!r}"
            try:
                # One byte at a time, so that nothing after the match is taken.
                shown += os.read(self._ours, 1).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it has ended without {pattern!r}: {shown!r}") from None
        return match

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    opened = Terminal()
    yield opened
    opened.close()


def test_a_chat_in_a_terminal(terminal):
    terminal.wait_for(r"(?i)cpu")  # the device
    terminal.wait_for(r"Chat with \S*demo\S*; context (\d+) tokens")
    terminal.wait_for(r"/help lists the commands.*\s+> ")

    def left_after(question: str) -> int:
        terminal.type(f"{question}\r")
        return int(terminal.wait_for(r"\[(\d+) of \d+ tokens of context left\]\s+> ")[1])

    terminal.type("not sent")
    terminal.wait_for("not sent")
    time.sleep(0.5)  # CPython's input() overlooks a signal that comes just before it waits for the next key
    terminal.type(CTRL_C)
    terminal.wait_for(r"\(line cleared; Ctrl-D or /exit ends the chat\)\s+> ")
    first = left_after("What can you do?")
    second = left_after("And more?")
    terminal.type("/help\r")
    terminal.wait_for(r"/clear +forget the conversation[\s\S]*Ctrl-C stops an answer\.\s+> ")
    terminal.type("/clear\r")
    terminal.wait_for(r"\(the conversation is empty\)\s+> ")
    assert (left_after("What can you do?"), second < first) == (first, True)
    terminal.type("/system Be brief.\r")
    terminal.wait_for(r"\(the conversation is empty\)\s+> ")
    assert left_after("What can you do?") < first
    terminal.type("/bogus\r")
    terminal.wait_for(r"/bogus is not a command; there are /help")
    terminal.type("/exit\r")
    assert terminal.process.wait(30) == 0
