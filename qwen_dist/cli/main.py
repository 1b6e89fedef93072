"""The entry point: arguments to a command, its configuration and its exit code.

Exit codes: 0 done (of a batch also when records have an error), 1 failed, 2 wrong usage, 75 stopped by SIGTERM after saving
(finetune), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from qwen_dist.cli.command_parser import describe_unknown, find_command
from qwen_dist.cli.commands import COMMANDS, EXIT_INTERRUPTED, build_parser, load_verb
from qwen_dist.errors import UsageError, UserError, printable_lines
from qwen_dist.failures import describe_failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(build_parser()[0])
    name = "qwen-dist"
    try:
        command = find_command(given, COMMANDS)
        parser, parsers = build_parser([command] if command else [])
        options, unknown = parser.parse_known_args(given)
        name = f"qwen-dist {options.verb}"
        overrides = [argument for argument in unknown if argument.startswith("--config.")]
        if wrong := [argument for argument in unknown if argument not in overrides]:
            raise UsageError(describe_unknown(wrong, parsers[options.verb].flags, options.verb))
        verb = load_verb(options.verb)
        config, flags = verb.read(options, overrides)
        if flags.print_config:
            print(json.dumps(dataclasses.asdict(config), indent=2))
            return 0
        return verb.run(config, flags)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe (`| head`). Redirect stdout, or the interpreter prints an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in given:
            raise
        message = error if isinstance(error, UserError) else describe_failure(error)
        print(f"{name}: {printable_lines(message, max_chars=1000)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
