"""The command line, `qwen-dist COMMAND …`: one module for each command."""

from qwen_dist.cli.main import main

__all__ = ["main"]
