"""The argument parser: unknown flags and commands are listed with the one that was probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from qwen_dist.errors import UsageError, printable, printable_lines

# Names of other tools, and the flag or key that has their meaning here.
OTHER_NAMES = {
    "-c": "--config",
    "-m": "--model",
    "-p": "--prompt",
    "--batch": "--batch-size",
    "--epochs": "--config.epochs",
    "--lora-rank": "--config.lora.rank",
    "--lr": "--learning-rate",
    "--max-length": "--config.data.max_length",
    "--max-seq-length": "--config.data.max_length",
    "--max-tokens": "--max-new-tokens",
    "--model-path": "--model",
    "--num-train-epochs": "--config.epochs",
    "--rank": "--config.lora.rank",
    "--system-prompt": "--system",
    "--temp": "--temperature",
    "--tensor-parallel-size": "--mesh",
    "--tp": "--mesh",
}


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are short enough to read and free of control characters."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {printable_lines(message)}\n")

    @property
    def flags(self) -> list[str]:
        """All long flags."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def find_command(given: Sequence[str], commands: Collection[str]) -> str | None:
    """Return the command, the first argument that is no flag; None where there is none, or a flag before it needs none.

    Raises:
      UsageError: there is no such command.
    """
    name = next((argument for argument in given if not argument.startswith("-")), None)
    if name is None or {"-h", "--help", "--version"} & set(given[: given.index(name)]):
        return None
    if name in commands:
        return name
    known = {"chat": "generate", "run": "generate", "server": "serve", "train": "finetune", "sft": "finetune"}
    close = known.get(name) or next(iter(difflib.get_close_matches(name, commands, n=1)), None)
    meant = f"; did you mean {close}?" if close else "."
    raise UsageError(f"{printable(name, 60)!r} is not a command{meant} The commands are {', '.join(commands)}.")


def describe_unknown(unknown: Sequence[str], flags: Collection[str], command: str) -> str:
    """Return a message that lists every argument that the command does not have, each with what may be meant."""
    names = [argument for argument in unknown if argument.startswith("-")]
    # What follows an unknown flag is its value; without one it is a word too many.
    names = names or list(unknown)
    lines = [f"unknown argument {' '.join(printable(name.partition('=')[0], 60) for name in names)}"]
    for name in names:
        if suggestion := _suggestion(name.partition("=")[0], flags, command):
            lines.append(f"  {printable(name.partition('=')[0], 60)}: {suggestion}")
    lines.append(f"`qwen-dist {command} --help` lists all flags")
    return "\n".join(lines) if len(lines) > 2 else "; ".join(lines)


def _suggestion(name: str, flags: Collection[str], command: str) -> str:
    if not name.startswith("-"):
        value = {"generate": "--prompt", "batch": "--input", "finetune": "--data"}.get(command, "--model")
        return f"did you mean {value} {printable(repr(name), 60)}?"
    other = OTHER_NAMES.get(name, "")
    if other in flags or other.startswith("--config."):
        return f"did you mean {other}?"
    close = difflib.get_close_matches(name, flags, n=1)
    return f"did you mean {close[0]}?" if close else ""
