"""Errors that a user can cause. The command line prints their message without a traceback."""

import unicodedata
from collections.abc import Sequence


class UserError(ValueError):
    """An input cannot be used. The message says what was given, what is allowed and what to do."""


class UsageError(UserError):
    """A flag or a configuration key is wrong. The command line exits with 2 instead of 1."""


class CheckpointError(UserError):
    """A checkpoint cannot be used. The message names the file, the tensor, the expected and the actual value."""


def printable(text: object, max_chars: int = 300) -> str:
    """Return text from outside so that it can be printed: one line, control characters escaped, cut to `max_chars`."""
    text = str(text)
    is_cut = len(text) > max_chars
    escaped = "".join(char if _is_printable(char) else char.encode("unicode_escape").decode() for char in text[:max_chars])
    return escaped[:max_chars] + "…" if is_cut or len(escaped) > max_chars else escaped


def printable_lines(text: object, max_lines: int = 40, max_chars: int = 500) -> str:
    """Return a message with each line as by `printable`; of more than `max_lines`, the first ones and how many follow."""
    lines = str(text).split("\n")
    shown = [printable(line, max_chars) for line in lines[:max_lines]]
    return "\n".join([*shown, f"… and {len(lines) - max_lines} more lines"] if len(lines) > max_lines else shown)


def problem_list(problems: Sequence[str], max_listed: int = 20) -> str:
    """Return one indented line for each problem; of many, the first ones and how many follow."""
    lines = [printable(problem, 500) for problem in problems[:max_listed]]
    if len(problems) > max_listed:
        lines.append(f"and {len(problems) - max_listed} more")
    return "\n".join(f"  - {line}" for line in lines)


def _is_printable(char: str) -> bool:
    # Control characters, format characters such as a right-to-left override, surrogates and line ends.
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
