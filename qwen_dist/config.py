"""The configuration of a run: frozen dataclasses, bound once and strictly from an `ml_collections` ConfigDict.

A configuration file (`configs/*.py`) may set any subset of the fields. The defaults of the other fields are here only.
Misspelt, missing and mistyped keys raise one `UsageError` that lists all of them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from qwen_dist.chat import variable_problems
from qwen_dist.config_files import load_config_file
from qwen_dist.errors import UsageError, printable, problem_list
from qwen_dist.json_reader import JsonError, parse_json

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model to load.

    Attributes:
      path: a checkpoint directory or a hub id.
      dtype: of parameters and activations.
      load_format: "dummy" makes random weights on the devices, so the directory needs no weight files.
      ignored_config_keys: unknown keys of the checkpoint's and the adapter's JSON files, separated by commas, that do not
        change the computation. `attn_factor` names a key of any object, `rope_scaling.attn_factor` that of one:
        rope_scaling, quantization_config, generation_config or tokenizer_config.
      host_memory_budget: bound on the loader's buffers, such as 256MB; empty for the loader's default.
      adapter: a directory in PEFT's format; the adapter is merged into the weights.
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
class ExportModelOptions(ModelOptions):
    """The model to export. Nothing is computed, so float16 is possible, too."""

    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """See `engine.request.SamplingParams`. None takes the value of the checkpoint's generation_config.json."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Variables of the chat template, which must use them.

    Attributes:
      thinking: on or off sets `enable_thinking`, which Qwen3's templates have.
      template_args: others, each `name=value`, where the value is JSON or a text.
    """

    thinking: Literal["on", "off"] | None = None
    template_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [text for text in self.template_args if not text.partition("=")[0].isidentifier() or "=" not in text]
        problems = [f"it must be name=value, and not {', '.join(map(repr, wrong))}"] if wrong else []
        problems += variable_problems(self.variables)
        if self.thinking is not None and any(text.startswith("enable_thinking=") for text in self.template_args):
            problems.append("thinking sets enable_thinking, too; give one of them")
        if problems:
            raise UsageError(f"chat.template_args (--template-arg): {'; '.join(problems)}")

    @property
    def variables(self) -> dict[str, Any]:
        """The variables by name."""
        pairs = (text.partition("=") for text in self.template_args)
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking == "on"}
        return thinking | {name: _parse_json_or_text(text) for name, _, text in pairs}


def _parse_json_or_text(text: str) -> Any:
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"))
    except JsonError:
        return text


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """`qwen-dist generate`. `mesh` is written like `fsdp=2,tensor=4`; empty takes `mesh.default_mesh`."""

    model: ModelOptions
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()
    chat: ChatOptions = ChatOptions()


# Every request has rows in tables on the host and on the devices, whether there is room in the cache or not.
MAX_BATCH_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How many requests the engine answers at a time, and in which order.

    Attributes:
      policy: which waiting request is admitted next: "throughput" takes the longest prompt, "latency" the first to come.
      max_batch_size: the most requests that are generated at the same time.
      kv_cache_memory: bound on the KV cache of each device.
      steps_per_dispatch: decode steps on the device before the host reads the tokens.
    """

    policy: Literal["throughput", "latency"] = "throughput"
    max_batch_size: int = 96
    kv_cache_memory: str = "4GB"
    steps_per_dispatch: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"engine.max_batch_size is {self.max_batch_size}; it must be from 1 to {MAX_BATCH_SIZE}")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """`qwen-dist batch`. An interrupted run is resumable: the same command continues it.

    Attributes:
      input, output: files of records and of results.
      mesh: as in `GenerateConfig`, over the devices of one replica.
      num_replicas: divides the processes into this many replicas. Each has the whole model on its own mesh and generates
        its share of the records.
      raw: leave out the chat template.
      overwrite: start over where results exist.
      retry_errors: try the records again that ended in an error.
      keep_order: sort the finished output into the order of the input.
      max_line_size: a longer input line, or row of a parquet file, is answered with an error.
      metrics_port: serve metrics for Prometheus at this port during the run.
      metrics_host: the address that the metrics are served on; the default is for this machine only.
      profile: a directory for a trace of the first seconds.
      chart: an HTML file with throughput, requests and cache use over time.
    """

    model: ModelOptions
    input: str
    output: str
    mesh: str = ""
    sampling: SamplingOptions = SamplingOptions()
    chat: ChatOptions = ChatOptions()
    engine: EngineOptions = EngineOptions()
    num_replicas: int = 1
    raw: bool = False
    overwrite: bool = False
    retry_errors: bool = False
    keep_order: bool = False
    max_line_size: str = "64MB"
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    profile: str = ""
    chart: str = ""

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 < self.metrics_port < 2**16:
            raise UsageError(f"metrics_port is {self.metrics_port}; it must be from 1 to {2**16 - 1}")
        _check_line_size("max_line_size", self.max_line_size)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The training data. See docs/finetune.md for the formats of files and records.

    Attributes:
      files, eval_files: paths, which may contain `*`.
      max_length: the most tokens of a sequence; at most the model's context.
      packing: put several sequences into one row.
      raw: leave the chat template out of prompts and completions.
      bad_records: stop at records that cannot be used, or skip them.
      max_line_size: the most bytes of a line, of a row of a parquet file or of a plain text.
      seed: of the shuffle.
    """

    files: tuple[str, ...]
    eval_files: tuple[str, ...] = ()
    max_length: int = 1024
    packing: bool = True
    raw: bool = False
    bad_records: Literal["refuse", "skip"] = "refuse"
    max_line_size: str = "64MB"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_line_size("data.max_line_size", self.max_line_size)


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters, on the linear layers that match one of `target_modules`: a name, a regular expression, or
    `all-linear` for all of them.

    The output of an adapter is scaled by alpha / rank, or with `use_rslora` by alpha / √rank.
    """

    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimiser and its schedule. The learning rate rises linearly in the warm-up, then follows `schedule`.

    Attributes:
      learning_rate: the highest of the run; None for 2e-4 with adapters and 1e-5 without.
      warmup_steps: the length of the warm-up.
      warmup_ratio: its length as a fraction of the run, rounded up, as in transformers; only without warmup_steps.
      min_lr_ratio: the linear and cosine schedules end at this fraction of the learning rate.
      weight_decay: decoupled, on matrices only.
      clip_norm: bound on the global gradient norm; 0 for none.
      b1: also Muon's momentum.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """`qwen-dist finetune`.

    Attributes:
      method: train all parameters (`full`) or low-rank adapters (`lora`).
      output: a directory for checkpoints, metrics and, at the end, the model or the adapter.
      batch_size: rows per step, on all devices together.
      num_microbatches: the micro-batches that a batch is divided into; their gradients are accumulated.
      steps, epochs: the length of the run; 0 steps takes `epochs`, otherwise `steps` decides.
      remat: what the backward pass recomputes: nothing (`none`), everything but the outputs of matmuls with weights
        (`selective`), or whole blocks (`full`).
      master_weights: keep the trained parameters in at least float32 and compute in model.dtype; otherwise train in
        model.dtype.
      save_every: steps between checkpoints; 0 for one at the end.
      max_to_keep: the newest checkpoints that are kept.
      keep_best: also keep the checkpoint with the lowest evaluation loss.
      eval_every: steps between evaluations; 0 for one at the end.
    """

    model: ModelOptions
    data: DataOptions
    output: str
    method: Literal["full", "lora"] = "lora"
    chat: ChatOptions = ChatOptions()
    lora: LoraOptions = LoraOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    mesh: str = ""
    batch_size: int = 8
    num_microbatches: int = 1
    steps: int = 0
    epochs: float = 1.0
    remat: Literal["none", "selective", "full"] = "none"
    master_weights: bool = True
    save_every: int = 0
    max_to_keep: int = 2
    keep_best: bool = False
    eval_every: int = 0
    tensorboard: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = {"data.max_length": (self.data.max_length, 2), "lora.rank": (self.lora.rank, 1)}
        counts |= {name: (getattr(self, name), 1) for name in ("batch_size", "num_microbatches", "max_to_keep")}
        counts |= {name: (getattr(self, name), 0) for name in ("steps", "save_every", "eval_every")}
        problems = [
            f"{name} is {value}; it must be at least {least}" for name, (value, least) in counts.items() if value < least
        ]
        if not self.data.files:
            problems.append("data.files is empty; give at least one file")
        if self.num_microbatches > 0 and self.batch_size % self.num_microbatches:
            problems.append(
                f"batch_size is {self.batch_size}; it must be a multiple of num_microbatches, {self.num_microbatches}"
            )
        if not self.steps and self.epochs <= 0:
            problems.append(f"epochs is {self.epochs}; it must be above 0, or give steps")
        problems += self._optimizer_problems()
        if self.keep_best and not self.data.eval_files:
            problems.append("keep_best needs data.eval_files")
        if problems:
            raise UsageError(f"the configuration cannot be used:\n{problem_list(problems)}")

    def resolved(self, max_context: int) -> FinetuneConfig:
        """Return the configuration with the values that follow from the method and the context of the model."""
        rate = self.optimizer.learning_rate
        optimizer = dataclasses.replace(self.optimizer, learning_rate=LEARNING_RATES[self.method] if rate is None else rate)
        data = dataclasses.replace(self.data, max_length=min(self.data.max_length, max_context))
        return dataclasses.replace(self, optimizer=optimizer, data=data)

    def _optimizer_problems(self) -> list[str]:
        options, problems = self.optimizer, []
        if options.learning_rate is not None and options.learning_rate < 0:
            problems.append(f"optimizer.learning_rate is {options.learning_rate}; it must be at least 0")
        if options.warmup_steps < 0:
            problems.append(f"optimizer.warmup_steps is {options.warmup_steps}; it must be at least 0")
        if not 0 <= options.warmup_ratio < 1:
            problems.append(f"optimizer.warmup_ratio is {options.warmup_ratio}; it must be at least 0 and below 1")
        if options.warmup_steps and options.warmup_ratio:
            problems.append("optimizer.warmup_steps and optimizer.warmup_ratio are both given; give one of them")
        if self.steps and options.warmup_steps > self.steps:
            problems.append(f"optimizer.warmup_steps is {options.warmup_steps}, and the run has {self.steps} steps")
        for pattern in self.lora.target_modules:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(f"lora.target_modules: {printable(repr(pattern), 80)} is not a regular expression: {error}")
        return problems


# Peak learning rates for --method, as peft's and transformers' examples have them.
LEARNING_RATES = {"lora": 2e-4, "full": 1e-5}


def load_config(
    cls: type[T],
    file: str | None,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> T:
    """Read a configuration: defaults, then `file`, then `overrides`, then `values`.

    Args:
      cls: the dataclass to bind to.
      file: a Python file with `get_config(arg) -> ConfigDict` (`FILE` or `FILE:ARG`), or a `.yaml` or `.json` file with
        the same keys, nested or dotted; None for none.
      overrides: `--config.key=value` arguments as given.
      values: dotted key -> value, from other flags.
      defaults: dotted key -> value, for keys that nothing else sets.

    Raises:
      UsageError: listing every key that is unknown, missing or mistyped.
    """
    given: dict[str, Any] = {} if file is None else load_config_file(file)
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if equals:
            _set(given, key, _RawText(text), problems)
        else:
            problems.append(f"--config.{key} has no value: write --config.{key}=VALUE")
    for key, value in values.items():
        _set(given, key, value, problems)
    for key, value in defaults.items():
        if not _is_set(given, key):
            _set(given, key, value, problems)
    return bind_config(cls, given, problems)


def parse_bytes(text: str) -> int:
    """Parse a size such as `256MB` or `2GiB` into bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{printable(repr(text), 60)} is not a size; examples are 256MB, 1.5GB and 2GiB")
    number, unit, binary = match.groups()
    if len(number) > 18:
        raise UsageError(f"the size {printable(text, 40)} has {len(number)} digits; examples are 256MB, 1.5GB and 2GiB")
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _check_line_size(name: str, text: str) -> None:
    try:
        size = parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    if size < 1000:
        raise UsageError(f"{name} is {text}; it must be at least 1kB")


def bind_config(cls: type[T], given: Mapping[str, Any], problems: Iterable[str] = ()) -> T:
    """Return an instance of the dataclass `cls` from nested dictionaries.

    Args:
      cls: the dataclass.
      given: its fields.
      problems: found before, to be listed first.

    Raises:
      UsageError: listing every problem.
    """
    problems = list(problems)
    bound = _bind(cls, given, "", problems)
    if problems:
        raise UsageError(f"the configuration cannot be used:\n{problem_list(problems)}")
    return bound


# The flags that set the keys without which a command cannot run.
_REQUIRED_FLAGS = {"model.path": "--model", "input": "--input", "output": "--output", "data.files": "--data"}


def _give(key: str) -> str:
    return f"; give {_REQUIRED_FLAGS[key]}" if key in _REQUIRED_FLAGS else ""


class _RawText(str):
    """A value from the command line, not yet parsed as the type of its field."""


def _bind(cls: Any, given: Any, prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(given, Mapping):
        problems.append(f"{prefix[:-1]} is {printable(repr(given), 120)}; it must hold fields: {', '.join(fields)}")
        return None
    for key in sorted(given.keys() - fields.keys()):
        close = difflib.get_close_matches(key[:80], fields, n=1)
        meant = f"; did you mean {prefix}{close[0]}?" if close else f"; the fields are {', '.join(fields)}"
        problems.append(f"{prefix}{printable(key, 80)} is not a field{meant}")
    values = {}
    for name, field in fields.items():
        value, kind = given.get(name, dataclasses.MISSING), hints[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _bind(kind, {} if value is dataclasses.MISSING else value, f"{prefix}{name}.", problems)
        elif value is dataclasses.MISSING or (value is None and field.default is dataclasses.MISSING):
            if field.default is dataclasses.MISSING:
                problems.append(f"{prefix}{name} is missing{_give(prefix + name)}")
            values[name] = field.default
        else:
            values[name] = _convert(kind, value, prefix + name, problems)
    return None if problems else cls(**values)


_NO_FLOAT16 = (
    " (activations of Qwen models exceed 65504, the largest float16; devices without bfloat16 can use float32, and export "
    "writes float16)"
)


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    # The union of a Literal and None is one of typing's.
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if isinstance(value, _RawText):
        value = _parse_text(kinds, value)
    for one in kinds:
        if typing.get_origin(one) is Literal:
            if value in typing.get_args(one):
                return value
        elif typing.get_origin(one) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif isinstance(value, bool) and one is not bool:
            continue
        elif one is float and isinstance(value, int | float):
            if math.isfinite(value) and abs(value) < 1e300:
                return float(value)
        elif isinstance(value, one) and not (one is int and abs(value) >= 2**63):
            return value
    reason = _NO_FLOAT16 if value in ("float16", "fp16", "half") else ""
    problems.append(f"{name} is {printable(repr(value), 120)}; it must be {' or '.join(map(_describe, kinds))}{reason}")
    return None


def _parse_text(kinds: Iterable[Any], text: str) -> Any:
    """Parse a text as the first of these types that it fits; return it unchanged if it fits none."""
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


def _is_set(given: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(given, dict) or name not in given:
            return False
        given = given[name]
    return True


def _set(given: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Set the value of a dotted key. `bind_config` checks whether the field exists and its type."""
    *parents, name = key.split(".")
    for parent in parents:
        given = given.setdefault(parent, {})
        if not isinstance(given, dict):
            problems.append(f"{key} cannot be set: {parent} is {given!r} and has no fields")
            return
    given[name] = value
