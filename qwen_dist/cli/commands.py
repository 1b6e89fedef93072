"""The commands: their names, one line about each, and exit codes. A command's module is imported when the command runs."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from qwen_dist.cli.command_parser import CommandParser
from qwen_dist.cli.version import VersionAction

if TYPE_CHECKING:
    from qwen_dist.cli.flags import Verb

COMMANDS = {
    "generate": "answer a prompt, or chat",
    "batch": "answer every line of a file",
    "serve": "answer requests of the OpenAI API over HTTP",
    "finetune": "train a model or an adapter on your data",
    "inspect": "show what a checkpoint holds and what loading costs",
    "doctor": "show what a run on this machine would use, and what is missing",
    "export": "load a checkpoint and save it in the format of transformers",
    "quantize": "save a checkpoint with its weights in fewer bits",
    "preflight": "check processes and devices before a run",
    "parity": "compare with PyTorch, component by component",
    "plan": "estimate memory and speed of a model on any devices",
}

# Exit codes of commands besides 0 (done), 1 (failed) and 2 (wrong usage).
EXIT_SIGTERM = 75  # EX_TEMPFAIL: the same command resumes the run
EXIT_INTERRUPTED = 130


def load_verb(name: str) -> Verb:
    """Import the module of a command, `qwen_dist.cli.NAME`, and return the command."""
    return importlib.import_module(f"qwen_dist.cli.{name}").VERB


def build_parser(names: Collection[str] = COMMANDS) -> tuple[CommandParser, dict[str, CommandParser]]:
    """Return the parser of the command line and the parser of each command in `names`; the others are only listed."""
    parser = CommandParser(prog="qwen-dist", description="Run and fine-tune Qwen text models in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=VersionAction)
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    parsers = {}
    for name, about in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=about, description=about, allow_abbrev=False, add_help=False)
        if name in names:
            load_verb(name).add_flags(parsers[name])
    return parser, {name: parsers[name] for name in names}
