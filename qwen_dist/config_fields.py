"""The fields of configuration dataclasses: each key's type, default, flag and help are written once, where the field is."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, NamedTuple

# Headings of --help for what is not the topic of a nested dataclass.
DEVICES = "devices and processes"
GENERAL = "general"


class Option(NamedTuple):
    """What a field's metadata holds; see `option`."""

    flag: str = ""
    metavar: str = ""
    help: str = ""
    group: str = ""
    const: str | None = None


class ConfigField(NamedTuple):
    """A key of a configuration.

    Attributes:
      key: dotted, as in `--config.key=value`.
      type: the annotation.
      default: `dataclasses.MISSING` for a required key.
      flag: empty for a key without one.
      help: one line without type and default.
      option: the rest of what `--help` needs.
    """

    key: str
    type: Any
    default: Any
    flag: str
    help: str
    option: Option

    @property
    def group(self) -> str:
        """The heading in `--help`: the topic, which is the outermost dataclass; empty for the command's own keys."""
        return self.option.group or self.key.rpartition(".")[0].partition(".")[0]

    @property
    def kind(self) -> Any:
        """The type without None."""
        return next(kind for kind in alternatives(self.type) if kind is not types.NoneType)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; for other types there are none."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def type_name(self) -> str:
        """The type in words, as in error messages."""
        return " or ".join(map(describe_type, alternatives(self.type)))


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: str = "",
    metavar: str = "",
    group: str = "",
    const: str | None = None,
) -> Any:
    """Return a field of a configuration dataclass.

    Args:
      default: without one, the key is required.
      help: one line; `--help` adds the choices of a Literal and the default.
      flag: such as `--max-new-tokens`; a word without dashes is a positional argument. Without one, only a file and
        `--config.key=value` set the key.
      metavar: the flag's value in `--help`; without one, the choices of a Literal. With one, the flag of a bool takes on or
        off; without one, it takes no value.
      group: the heading in `--help`, if it is not the name of the nested dataclass.
      const: the value of a flag that is given without one.
    """
    return dataclasses.field(default=default, metadata={"option": Option(flag, metavar, help, group, const)})


def config_fields(cls: type, prefix: str = "") -> list[ConfigField]:
    """Return the fields of a configuration dataclass, those of nested dataclasses included, in the order of the classes."""
    hints, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found += config_fields(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            about: Option = field.metadata.get("option", Option())
            found.append(ConfigField(prefix + field.name, kind, field.default, about.flag, about.help, about))
    return found


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union; of another type, that type."""
    # The union of a Literal and None is one of typing's.
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def describe_type(kind: Any) -> str:
    """Return a type, which is no union, in words."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a tuple of strings, such as ('a', 'b')"
    return "None" if kind is types.NoneType else kind.__name__
