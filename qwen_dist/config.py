"""What a run is told: frozen dataclasses, bound once and strictly from an `ml_collections` ConfigDict.

A configuration file (`configs/*.py`) may set any subset of the fields; what it leaves out has the default written here,
and nowhere else. A misspelt, missing or mistyped key is one `UsageError` that lists all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from qwen_dist.errors import UsageError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which weights, and how they are held. `path` is a checkpoint directory or a hub id.

    load_format "dummy" makes random weights on the devices, for which a directory with a `config.json` is enough.
    `ignored_config_keys`, separated by commas, are keys of config.json that you vouch for. `host_memory_budget`, such as
    256MB, bounds the loader's buffers; empty leaves it to the loader.
    """

    path: str
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    ignored_config_keys: str = ""
    host_memory_budget: str = ""

    @property
    def host_memory_bytes(self) -> int | None:
        return parse_bytes(self.host_memory_budget) if self.host_memory_budget else None

    @property
    def ignored_keys(self) -> list[str]:
        return [key.strip() for key in self.ignored_config_keys.split(",") if key.strip()]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """See `engine.request.SamplingParams`; None takes what the checkpoint's generation_config.json says."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """`qwen-dist generate`. `mesh` as in `fsdp=2,tensor=4`; empty is one device."""

    model: ModelOptions
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """`qwen-dist batch`: JSON lines in `input`, answers to `output`. `raw` leaves the chat template out."""

    model: ModelOptions
    input: str
    output: str
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()
    max_batch_size: int = 32
    raw: bool = False
    overwrite: bool = False


def load_config(cls: type[T], file: str | None, overrides: Sequence[str], values: Mapping[str, Any]) -> T:
    """Read a configuration: defaults, then `file`, then `overrides`, then `values`.

    Args:
      cls: the dataclass to bind to.
      file: `FILE` or `FILE:ARG`, a Python file with `get_config(arg) -> ConfigDict`; None for none.
      overrides: `--config.key=value` arguments as given.
      values: dotted key -> value, from other flags.

    Raises:
      UsageError: listing every key that is unknown, missing or mistyped.
    """
    from ml_collections import config_dict

    config = config_dict.ConfigDict(_defaults(cls))
    if file is not None:
        _update(config, _read(file), file)
    _override(config, overrides)
    for key, value in values.items():
        _assign(config, key, value)
    return bind(cls, config.to_dict())


def parse_bytes(text: str) -> int:
    """`256MB` or `2GiB` as a number of bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size; examples are 256MB, 1.5GB and 2GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def bind(cls: type[T], given: Mapping[str, Any]) -> T:
    """An instance of the dataclass `cls` from nested dictionaries. Raises UsageError listing every problem."""
    problems: list[str] = []
    bound = _bind(cls, given, "", problems)
    if problems:
        raise UsageError("the configuration cannot be used:\n  - " + "\n  - ".join(problems))
    return bound


def _bind(cls: Any, given: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in given.keys() - fields.keys():
        close = difflib.get_close_matches(key, fields, n=1)
        meant = f"; did you mean {prefix}{close[0]}?" if close else f"; there are {', '.join(fields)}"
        problems.append(f"{prefix}{key} is not a field{meant}")
    values = {}
    for name, field in fields.items():
        value, kind = given.get(name, dataclasses.MISSING), hints[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _bind(kind, {} if value is dataclasses.MISSING else value, f"{prefix}{name}.", problems)
        elif value is dataclasses.MISSING or (value is None and field.default is dataclasses.MISSING):
            if field.default is dataclasses.MISSING:
                problems.append(f"{prefix}{name} is missing")
            values[name] = field.default
        else:
            values[name] = _convert(kind, value, prefix + name, problems)
    return None if problems else cls(**values)


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for one in kinds:
        if typing.get_origin(one) is Literal:
            if value in typing.get_args(one):
                return value
        elif typing.get_origin(one) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif isinstance(value, one) and (one is bool or not isinstance(value, bool)):
            return value
        elif one is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    problems.append(f"{name} is {value!r}; it must be {' or '.join(map(_describe, kinds))}")
    return None


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a tuple of strings"
    return "None" if kind is types.NoneType else kind.__name__


def _defaults(cls: Any) -> dict[str, Any]:
    """The dataclass's defaults as a nested dictionary; a field without one is an empty placeholder of its type."""
    from ml_collections import config_dict

    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            defaults[field.name] = _defaults(kind)
        elif field.default in (None, dataclasses.MISSING):
            plain = next(one for one in (*typing.get_args(kind), kind) if one is not types.NoneType)
            defaults[field.name] = config_dict.placeholder(typing.get_origin(plain) or plain)
        else:
            defaults[field.name] = field.default
    return defaults


def _read(file: str) -> Mapping[str, Any]:
    path, _, argument = file.partition(":")
    if not pathlib.Path(path).is_file():
        raise UsageError(f"--config {file}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("qwen_dist_run_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"--config {file}: {path} has no function get_config(arg)")
    return module.get_config(argument)


def _update(config: Any, given: Mapping[str, Any], file: str) -> None:
    for key, value in given.items():
        if key in config and isinstance(config[key], Mapping) and isinstance(value, Mapping):
            _update(config[key], value, file)
        else:
            with config.unlocked(), config.ignore_type():
                config[key] = value  # `bind` judges names and types, all at once


def _override(config: Any, overrides: Sequence[str]) -> None:
    from absl import flags
    from ml_collections.config_flags import config_flags

    values = flags.FlagValues()
    arguments = ["qwen-dist", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).strip("'\"").split())) from None


def _assign(config: Any, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[name] = value
