"""What a run is told: frozen dataclasses, bound once and strictly from an `ml_collections` ConfigDict.

A configuration file (`configs/*.py`) may set any subset of the fields; what it leaves out has the default written here,
and nowhere else. A misspelt, missing or mistyped key is one `UsageError` that lists all of them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from qwen_dist.errors import UsageError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which weights, and how they are held. `path` is a checkpoint directory or a hub id.

    `adapter` is a directory in PEFT's layout whose low-rank adapter is added to the weights.
    load_format "dummy" makes random weights on the devices: the directory needs none.
    `ignored_config_keys`, separated by commas, are keys of config.json that you vouch for. `host_memory_budget`, such as
    256MB, bounds the loader's buffers; empty leaves it to the loader.
    """

    path: str
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    ignored_config_keys: str = ""
    host_memory_budget: str = ""
    adapter: str = ""

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
    """`qwen-dist generate`. `mesh` as in `fsdp=2,tensor=4`; empty is the default of `mesh.default_mesh`."""

    model: ModelOptions
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """`qwen-dist batch`: records of `input`, answers to `output`. `raw` leaves the chat template out.

    An interrupted run goes on where it was; `overwrite` begins anew, `retry_errors` answers again what ended in an error,
    `keep_order` puts the finished output into the order of the input. `cache_memory` bounds the key/value cache of each
    device; `steps_per_dispatch` is how many tokens a device makes before the host looks at them. While it runs, numbers are
    served for Prometheus at `metrics_port`, and a trace of its first seconds goes to the directory `profile`; the file
    `chart` shows afterwards how it went.

    `groups` divides the processes of a run into as many groups, each with the whole model on a `mesh` of its own devices
    and its share of the records; 1 is one mesh over all.
    """

    model: ModelOptions
    input: str
    output: str
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()
    max_batch_size: int = 96
    groups: int = 1
    raw: bool = False
    overwrite: bool = False
    retry_errors: bool = False
    keep_order: bool = False
    cache_memory: str = "4GB"
    steps_per_dispatch: int = 1
    metrics_port: int | None = None
    profile: str = ""
    chart: str = ""

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise UsageError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")
        if self.metrics_port is not None and not 0 < self.metrics_port < 2**16:
            raise UsageError(f"metrics_port is {self.metrics_port}; it must be from 1 to {2**16 - 1}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to train on: see docs/finetune.md for the forms of files and records.

    files, eval_files: paths, of which `*` may be a part. A sequence has at most `max_length` tokens. `packing` puts several
    into a row. `raw` leaves the chat template out of prompts and completions. `bad_records`: stop at them, or skip them.
    """

    files: tuple[str, ...]
    eval_files: tuple[str, ...] = ()
    max_length: int = 1024
    packing: bool = True
    raw: bool = False
    bad_records: Literal["refuse", "skip"] = "refuse"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters: on the linear layers whose name matches one of `targets` (a name or a regular expression).

    An adapter's contribution is scaled by alpha / rank, or with `rslora` by alpha / √rank.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How parameters change. The learning rate rises linearly for `warmup_steps`, then follows `schedule`.

    The linear and cosine schedules reach `final_fraction` of the learning rate at the last step. weight_decay: decoupled,
    on matrices only. clip_norm: the largest norm of all gradients together; 0 for any. b1 is also Muon's momentum.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """`qwen-dist finetune`.

    Attributes:
      method: train all parameters, or adapters on some of them (`lora`).
      output: a directory for checkpoints, metrics and, at the end, the model or the adapter.
      batch_size: rows a step, on all devices together, taken in `accumulation` parts one after the other.
      steps, epochs: how long; `steps` wins, and 0 means as many as `epochs` take.
      remat: what the backward pass computes again: nothing, all but the products with weights, or whole blocks.
      master_weights: keep what is trained in float32 at least, and compute in model.dtype; else train in model.dtype.
      save_every: steps between checkpoints, 0 for one at the end; the newest `keep` stay, and with `keep_best` also the one
        of the lowest evaluation loss.
      eval_every: steps between evaluations, 0 for one at the end.
    """

    model: ModelOptions
    data: DataOptions
    output: str
    method: Literal["full", "lora"] = "lora"
    lora: LoraOptions = LoraOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    mesh: str = ""
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 0
    epochs: float = 1.0
    remat: Literal["none", "products", "blocks"] = "none"
    master_weights: bool = True
    save_every: int = 0
    keep: int = 2
    keep_best: bool = False
    eval_every: int = 0
    tensorboard: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = {"data.max_length": (self.data.max_length, 2), "lora.rank": (self.lora.rank, 1)}
        counts |= {name: (getattr(self, name), 1) for name in ("batch_size", "accumulation", "keep")}
        counts |= {name: (getattr(self, name), 0) for name in ("steps", "save_every", "eval_every")}
        problems = [
            f"{name} is {value}; it must be at least {least}" for name, (value, least) in counts.items() if value < least
        ]
        if not self.data.files:
            problems.append("data.files is empty; give at least one file")
        if self.accumulation > 0 and self.batch_size % self.accumulation:
            problems.append(
                f"batch_size {self.batch_size} cannot be taken in {self.accumulation} equal parts (accumulation)"
            )
        if not self.steps and self.epochs <= 0:
            problems.append(f"epochs is {self.epochs}; it must be above 0, or give steps")
        if self.keep_best and not self.data.eval_files:
            problems.append("keep_best needs data.eval_files to judge by")
        if problems:
            raise UsageError("the configuration cannot be used:\n  - " + "\n  - ".join(problems))


def load_config(
    cls: type[T],
    file: str | None,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> T:
    """Read a configuration: defaults, then `file`, then `overrides`, then `values`.

    Args:
      cls: the dataclass to bind_config to.
      file: `FILE` or `FILE:ARG`, a Python file with `get_config(arg) -> ConfigDict`; None for none.
      overrides: `--config.key=value` arguments as given.
      values: dotted key -> value, from other flags.
      defaults: dotted key -> value, where nothing else says one.

    Raises:
      UsageError: listing every key that is unknown, missing or mistyped.
    """
    given: dict[str, Any] = {} if file is None else _read(file)
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if equals:
            _set(given, key, _Text(text), problems)
        else:
            problems.append(f"--config.{key} has no value: write --config.{key}=VALUE")
    for key, value in values.items():
        _set(given, key, value, problems)
    for key, value in defaults.items():
        if not _is_set(given, key):
            _set(given, key, value, problems)
    return bind_config(cls, given, problems)


def parse_bytes(text: str) -> int:
    """`256MB` or `2GiB` as a number of bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size; examples are 256MB, 1.5GB and 2GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def bind_config(cls: type[T], given: Mapping[str, Any], problems: Iterable[str] = ()) -> T:
    """An instance of the dataclass `cls` from nested dictionaries.

    Raises UsageError listing every problem, after those known before.
    """
    problems = list(problems)
    bound = _bind(cls, given, "", problems)
    if problems:
        raise UsageError("the configuration cannot be used:\n  - " + "\n  - ".join(problems))
    return bound


class _Text(str):
    """A value from the command line, still to be read as its field's type."""


def _bind(cls: Any, given: Any, prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(given, Mapping):
        problems.append(f"{prefix[:-1]} is {given!r}; it must hold fields: {', '.join(fields)}")
        return None
    for key in sorted(given.keys() - fields.keys()):
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
    if isinstance(value, _Text):
        value = _read_text(kinds, value)
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


def _read_text(kinds: Iterable[Any], text: str) -> Any:
    """What a text stands for in a field of one of these types; the text itself where it fits none."""
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is types.NoneType and text.lower() == "none":
            return None
        with contextlib.suppress(ValueError, SyntaxError):
            if kind in (int, float):
                return kind(text)
            if typing.get_origin(kind) is tuple:
                return ast.literal_eval(text)
    return str(text)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a tuple of strings, such as ('a', 'b')"
    return "None" if kind is types.NoneType else kind.__name__


def _read(file: str) -> dict[str, Any]:
    from ml_collections import config_dict

    path, _, argument = file.partition(":")
    if not pathlib.Path(path).is_file():
        raise UsageError(f"--config {file}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("qwen_dist_run_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if hasattr(module, "get_config") else None
    except Exception as error:  # whatever the user's own code can raise
        raise UsageError(f"--config {file} fails with {type(error).__name__}: {error}; --debug shows where") from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UsageError(f"--config {file}: {path} must have a function get_config(arg) that returns a ConfigDict")
    return config.to_dict()


def _is_set(given: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(given, dict) or name not in given:
            return False
        given = given[name]
    return True


def _set(given: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Put a value at a dotted key; whether there is such a field and what type it has is for `bind_config` to judge."""
    *parents, name = key.split(".")
    for parent in parents:
        given = given.setdefault(parent, {})
        if not isinstance(given, dict):
            problems.append(f"{key} cannot be set: {parent} is {given!r} and has no fields")
            return
    given[name] = value
