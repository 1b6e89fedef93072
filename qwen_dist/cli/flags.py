"""Flags, generated from the fields of dataclasses: those of a command's configuration, and others."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_dist.config import load_config
from qwen_dist.config_fields import DEVICES, GENERAL, ConfigField, config_fields, option

_CONFIG = "config."


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of all commands that are not part of the configuration."""

    config: str | None = option(
        None,
        flag="--config",
        metavar="FILE[:ARG]",
        group=GENERAL,
        help="a .py, .yaml or .json file; --config.key=value sets a key",
    )
    print_config: bool = option(
        False, flag="--print-config", group=GENERAL, help="print the configuration as a .json file for --config, and exit"
    )
    json: bool = option(False, flag="--json", group=GENERAL, help="print one JSON object, for programs")
    debug: bool = option(False, flag="--debug", group=GENERAL, help="show the traceback of an error")


@dataclasses.dataclass(frozen=True)
class DeviceFlags(Flags):
    """Flags of a command that uses devices."""

    num_cpu_devices: int | None = option(
        None, flag="--num-cpu-devices", metavar="N", group=DEVICES, help="run on N CPU devices of this machine"
    )


@dataclasses.dataclass(frozen=True)
class ProcessFlags(DeviceFlags):
    """Flags of a command that can run as several processes. On TPU pods, GKE and Slurm the cluster sets these."""

    coordinator: str | None = option(
        None,
        flag="--coordinator",
        metavar="HOST:PORT",
        group=DEVICES,
        help="address of process 0 (default: from the cluster)",
    )
    num_processes: int | None = option(
        None, flag="--num-processes", metavar="N", group=DEVICES, help="how many processes run this command"
    )
    process_id: int | None = option(
        None, flag="--process-id", metavar="I", group=DEVICES, help="the number of this process, from 0"
    )
    start_timeout: float | None = option(
        None,
        flag="--start-timeout",
        metavar="S",
        group=DEVICES,
        help="seconds to wait for them (60, or QWEN_DIST_START_TIMEOUT)",
    )


@dataclasses.dataclass(frozen=True)
class Verb:
    """A command.

    Attributes:
      name: of the command.
      config: the dataclass of its configuration; a field with a flag is a flag of the command.
      flags: the dataclass of its other flags.
      run: called with an instance of each; returns the exit code.
      examples: the end of its `--help`.
      usage: the beginning of its `--help`.
      defaults: values of configuration keys that nothing else sets.
    """

    name: str
    config: type
    flags: type[Flags]
    run: Callable[[Any, Any], int]
    examples: str
    usage: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, options: argparse.Namespace, overrides: Sequence[str]) -> tuple[Any, Any]:
        """Return the configuration and the other flags of parsed arguments.

        Raises:
          UsageError: listing every key that is unknown, missing or mistyped.
        """
        given = {name: value for name, value in vars(options).items() if value is not None}
        names = [field.name for field in dataclasses.fields(self.flags)]
        flags = self.flags(**{name: given[name] for name in names if name in given})
        values = {name.removeprefix(_CONFIG): value for name, value in given.items() if name.startswith(_CONFIG)}
        return load_config(self.config, flags.config, overrides, values, self.defaults), flags

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags and its help to a parser.

        The flags are in groups: those of the command itself, of nested dataclasses, of devices, and the general ones.
        """
        parser.usage = self.usage or f"qwen-dist {self.name} --model DIR_OR_HUB_ID [flags]"
        parser.epilog = self.examples
        parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110)
        config = [(_CONFIG + field.key, field) for field in config_fields(self.config)]
        other = [(field.key, field) for field in config_fields(self.flags)]
        topics: dict[str, list[tuple[str, ConfigField]]] = {self.name: []}
        for dest, field in config + other:
            if field.flag:
                topics.setdefault(field.group or self.name, []).append((dest, field))
        for topic in (DEVICES, GENERAL):
            topics[topic] = topics.pop(topic, [])
        for topic, fields in topics.items():
            group = parser.add_argument_group(topic)
            for dest, field in fields:
                _add_flag(group, dest, field)
        group.add_argument("-h", "--help", action="help", help="show this help and exit")


def _add_flag(group: Any, dest: str, field: ConfigField) -> None:
    about, help = field.option, help_text(field).replace("%", "%%")
    if field.kind is bool and not about.metavar:
        group.add_argument(field.flag, dest=dest, action="store_true", default=None, help=help)
        return
    settings: dict[str, Any] = {"metavar": about.metavar or "|".join(field.choices), "help": help}
    if not field.flag.startswith("-"):
        settings |= {"nargs": "?", "metavar": field.flag}
    elif about.const is not None:
        settings |= {"nargs": "?", "const": about.const}
    if typing.get_origin(field.kind) is tuple:
        settings["action"] = "append"
    elif field.kind in (int, float):
        settings["type"] = field.kind
    elif field.kind is bool:
        settings["type"] = _is_on
    names = [field.flag] if field.flag.startswith("-") else []
    action = group.add_argument(*names, dest=dest, **settings)
    if field.kind is bool:
        action.completer = lambda **_: ("on", "off")
    if field.choices:  # a wrong value is an error of the configuration, like one in a file; this is for argcomplete
        action.completer = lambda **_: field.choices


def _is_on(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is neither on nor off")
    return text == "on"


def help_text(field: ConfigField) -> str:
    """Return the help of a key with its choices and its default."""
    *most, last = field.choices or ("",)
    choices = f": {', '.join(most)} or {last}" if field.choices and field.option.metavar else ""
    is_shown = isinstance(field.default, str | int | float) and field.default
    default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    default = "on" if field.default is True and field.option.metavar else default
    return f"{field.help}{choices}" + (f" ({default})" if is_shown else "")
