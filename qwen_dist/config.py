"""The configuration of each command: frozen dataclasses, bound once and strictly from files and flags.

Type, default, flag and help of a key are written in its field, and nowhere else. A configuration file may set any subset.
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
from qwen_dist.config_fields import DEVICES, Option, alternatives, describe_type, option
from qwen_dist.config_files import load_config_file
from qwen_dist.errors import UsageError, printable, problem_list
from qwen_dist.json_reader import JsonError, parse_json

T = TypeVar("T")
Quantize = Literal["stored", "none", "int8", "int4", "fp8"]
KvCacheDtype = Literal["auto", "int8", "fp8"]


def _mesh() -> Any:
    return option(
        "",
        flag="--mesh",
        metavar="AXES",
        group=DEVICES,
        help="devices per mesh axis, such as fsdp=2,tensor=4",
    )


def _prefix_cache() -> Any:
    return option(
        True, flag="--prefix-cache", metavar="on|off", help="compute the beginning that several prompts have only once"
    )


def _adapter() -> Any:
    return option("", flag="--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into float weights")


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """A checkpoint whose configuration is read, and the dtype to compute in."""

    path: str = option(flag="--model", metavar="DIR_OR_HUB_ID", help="checkpoint in the Hugging Face format")
    dtype: Literal["bfloat16", "float32", "float64"] = option(
        "bfloat16", flag="--dtype", metavar="DTYPE", help="of parameters and activations"
    )
    ignored_config_keys: str = option(
        "",
        metavar="KEYS",
        help="unknown keys of the checkpoint's and the adapter's JSON files that do not change the computation, separated "
        "by commas: attn_factor in any object, or rope_scaling.attn_factor in one (rope_scaling, quantization_config, "
        "generation_config, tokenizer_config)",
    )

    @property
    def ignored_keys(self) -> list[str]:
        return [key.strip() for key in self.ignored_config_keys.split(",") if key.strip()]


@dataclasses.dataclass(frozen=True)
class LoadOptions(CheckpointOptions):
    """A checkpoint whose weights are read."""

    host_memory_budget: str = option(
        "", flag="--host-memory-budget", metavar="SIZE", help="bound on the loader's buffers, such as 256MB"
    )

    @property
    def host_memory_bytes(self) -> int | None:
        return parse_bytes(self.host_memory_budget) if self.host_memory_budget else None

    @property
    def needs_weights(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class LoadedModelOptions(LoadOptions):
    """A model whose weights are loaded, or random, and an adapter."""

    load_format: Literal["safetensors", "dummy"] = option(
        "safetensors", flag="--load-format", metavar="FORMAT", help="weight files, or random weights"
    )
    adapter: str = _adapter()

    @property
    def needs_weights(self) -> bool:
        return self.load_format != "dummy"


def _group_size() -> Any:
    return option(
        None,
        flag="--quantize-group-size",
        metavar="N",
        help="in-features with one scale; 0: all of a row (int4: 32, int8: 128, fp8: 0)",
    )


@dataclasses.dataclass(frozen=True)
class QuantizedWeightOptions:
    """Which weights are kept in fewer bits in memory."""

    quantize: Quantize = option("stored", flag="--quantize", metavar="FORM", help="the weights in memory (none: floats)")
    quantize_group_size: int | None = _group_size()
    quantize_head: bool = option(False, help="also the output weights, and so the embedding of a tied model, in int8")


@dataclasses.dataclass(frozen=True)
class TrainedModelOptions(QuantizedWeightOptions, LoadedModelOptions):
    """A model that is trained, whose weights under an adapter may be kept in fewer bits."""


@dataclasses.dataclass(frozen=True)
class QuantizedOptions(QuantizedWeightOptions):
    """What is kept in fewer bits in memory."""

    kv_cache_dtype: KvCacheDtype = option(
        "auto", flag="--kv-cache-dtype", metavar="FORM", help="keys and values in the cache (auto: as computed)"
    )


@dataclasses.dataclass(frozen=True)
class ModelOptions(QuantizedOptions, TrainedModelOptions):
    """A model that is run, whose weights may be kept in fewer bits."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """See `engine.request.SamplingParams`. None takes the value of the checkpoint's generation_config.json."""

    max_new_tokens: int | None = option(
        None, flag="--max-new-tokens", metavar="N", help="the most tokens to generate (512)"
    )
    temperature: float | None = option(
        None, flag="--temperature", metavar="T", help="0 always takes the most probable token"
    )
    top_k: int | None = option(None, flag="--top-k", metavar="K", help="sample from the K most probable tokens; 0 from all")
    top_p: float | None = option(
        None, flag="--top-p", metavar="P", help="sample from the fewest tokens with total probability P"
    )
    min_p: float | None = option(
        None, flag="--min-p", metavar="P", help="drop tokens below P times the highest probability"
    )
    repetition_penalty: float | None = option(
        None, flag="--repetition-penalty", metavar="R", help="above 1 makes earlier tokens less likely"
    )
    seed: int | None = option(None, flag="--seed", metavar="N", help="random seed; the same seed gives the same tokens")
    stop: tuple[str, ...] | None = option(
        None, flag="--stop", metavar="TEXT", help="stop before this text; may be repeated"
    )
    logprobs: int | None = option(
        None, flag="--logprobs", metavar="N", help="log-probabilities, with the N best alternatives"
    )
    presence_penalty: float | None = option(
        None, flag="--presence-penalty", metavar="P", help="subtracted once from tokens that the answer has"
    )
    frequency_penalty: float | None = option(
        None, flag="--frequency-penalty", metavar="P", help="subtracted for each time the answer has the token"
    )
    min_new_tokens: int | None = option(None, metavar="N", help="the fewest tokens to generate")


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Variables of the chat template, which must use them."""

    thinking: Literal["on", "off"] | None = option(
        None, flag="--thinking", help="sets enable_thinking of the chat template, as Qwen3's has"
    )
    template_args: tuple[str, ...] = option(
        (),
        flag="--template-arg",
        metavar="NAME=VALUE",
        help="sets a variable of the chat template, to JSON or a text; may be repeated",
    )

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
    """`qwen-dist generate`."""

    model: ModelOptions
    mesh: str = _mesh()
    sampling: SamplingOptions = SamplingOptions()
    chat: ChatOptions = ChatOptions()
    prompt: str | None = option(
        None, flag="--prompt", metavar="TEXT", help="default: standard input, or a chat in a terminal"
    )
    system: str | None = option(None, flag="--system", metavar="TEXT", help="the system message")
    raw: bool = option(False, flag="--raw", help="do not apply the chat template")
    prefix_cache: bool = _prefix_cache()

    def __post_init__(self) -> None:
        if self.raw and self.chat.variables:
            raise UsageError("--thinking and --template-arg set variables of the chat template, which --raw leaves out")


# Every request has rows in tables on the host and on the devices, whether there is room in the cache or not.
MAX_BATCH_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How many requests the engine answers at a time, and in which order."""

    policy: Literal["throughput", "latency"] = option(
        "throughput", help="which request is admitted next: that with the longest prompt, or the first to come"
    )
    max_batch_size: int = option(96, flag="--max-batch-size", metavar="N", help="the most requests at the same time")
    kv_cache_memory: str = option("4GB", metavar="SIZE", help="bound on the KV cache of each device")
    steps_per_dispatch: int = option(1, metavar="N", help="decode steps on the device before the host reads the tokens")
    prefix_cache: bool = _prefix_cache()
    snapshot_fraction: float = option(
        0.2,
        metavar="F",
        help="part of the KV cache for snapshots of recurrent layers' states, which their prefix cache needs: 0 up to 1",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.snapshot_fraction < 1:
            raise UsageError(f"engine.snapshot_fraction is {self.snapshot_fraction}; it must be at least 0 and below 1")
        if not 1 <= self.max_batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"engine.max_batch_size is {self.max_batch_size}; it must be from 1 to {MAX_BATCH_SIZE}")

    def arguments(self) -> dict[str, Any]:
        """Return the options as arguments of `engine.open.open_engine`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"cache_bytes": parse_bytes(fields.pop("kv_cache_memory")), **fields}


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """`qwen-dist batch`. An interrupted run is resumable: the same command continues it.

    With replicas, each has the whole model on its own `mesh` and generates its share of the records.
    """

    model: ModelOptions
    input: str = option(
        flag="--input",
        metavar="FILE",
        help='lines with "prompt" or "messages", or OpenAI\'s; a directory, pattern or address',
    )
    output: str = option(flag="--output", metavar="FILE", help="in the same formats; an interrupted run is resumed")
    mesh: str = _mesh()
    sampling: SamplingOptions = SamplingOptions()
    chat: ChatOptions = ChatOptions()
    engine: EngineOptions = EngineOptions()
    num_replicas: int = option(
        1, flag="--num-replicas", metavar="N", group=DEVICES, help="divide the processes into N replicas of the whole model"
    )
    raw: bool = option(False, flag="--raw", help="do not apply the chat template")
    overwrite: bool = option(False, flag="--overwrite", help="start over if results exist")
    retry_errors: bool = option(False, flag="--retry-errors", help="retry records that ended in an error")
    keep_order: bool = option(False, flag="--keep-order", help="write results in the order of the input")
    max_line_size: str = option(
        "64MB", flag="--max-line-size", metavar="SIZE", help="longer input lines are answered with an error"
    )
    metrics_port: int | None = option(
        None, flag="--metrics-port", metavar="PORT", help="serve Prometheus metrics during the run"
    )
    metrics_host: str = option("127.0.0.1", metavar="ADDRESS", help="serve them on this address")
    profile: str = option(
        "", flag="--profile", metavar="DIR", help="write a trace of the first seconds, for TensorBoard or XProf"
    )
    chart: str = option(
        "", flag="--chart", metavar="FILE", help="write an HTML page: throughput, requests and cache over time"
    )

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 < self.metrics_port < 2**16:
            raise UsageError(f"metrics_port is {self.metrics_port}; it must be from 1 to {2**16 - 1}")
        _check_line_size("max_line_size", self.max_line_size)


@dataclasses.dataclass(frozen=True)
class ServeEngineOptions(EngineOptions):
    """The engine of a server: who comes first is answered first."""

    policy: Literal["throughput", "latency"] = option(
        "latency", help="which request is admitted next: that with the longest prompt, or the first to come"
    )
    max_batch_size: int = option(32, flag="--max-batch-size", metavar="N", help="the most requests at the same time")


@dataclasses.dataclass(frozen=True)
class ServeModelOptions(ModelOptions):
    """The model that is served. Its adapters are `ServeConfig.adapters`."""

    adapter: str = option("", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into the weights")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """`qwen-dist serve`."""

    model: ServeModelOptions
    adapters: tuple[str, ...] = option(
        (),
        flag="--adapter",
        metavar="[NAME=]DIR",
        help="a LoRA adapter: with a name, for requests to choose (repeatable); without, merged",
    )
    host: str = option("127.0.0.1", flag="--host", metavar="ADDRESS", help="serve on this address; 0.0.0.0 for all")
    port: int = option(8000, flag="--port", metavar="PORT", help="serve on this port; 0 takes a free one")
    api_key: str = option(
        "",
        flag="--api-key",
        metavar="KEY",
        help="what clients must send; default: QWEN_DIST_API_KEY, which ps does not show",
    )
    served_name: str = option("", flag="--served-name", metavar="NAME", help="of the model, for requests; default: its own")
    mesh: str = _mesh()
    sampling: SamplingOptions = SamplingOptions()
    chat: ChatOptions = ChatOptions()
    engine: ServeEngineOptions = ServeEngineOptions()
    warm_up: bool = option(True, help="compile the programs before the first request")
    max_waiting: int = option(
        512, flag="--max-waiting", metavar="N", help="the most requests that wait; more are refused with status 429"
    )
    max_body_size: str = option("16MB", flag="--max-body-size", metavar="SIZE", help="the most bytes of a request")
    request_timeout: float = option(600.0, flag="--request-timeout", metavar="S", help="seconds for a whole request")
    header_timeout: float = option(10.0, metavar="S", help="seconds for the head of a request")
    drain_timeout: float = option(
        30.0, flag="--drain-timeout", metavar="S", help="seconds that running requests have after SIGTERM"
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port < 2**16:
            problems.append(f"port is {self.port}; it must be from 0 to {2**16 - 1}")
        if self.max_waiting < 0:
            problems.append(f"max_waiting is {self.max_waiting}; it must be at least 0")
        for name in ("request_timeout", "header_timeout", "drain_timeout"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} is {getattr(self, name):g}; it must be above 0 seconds")
        if not all("!" <= char <= "~" for char in self.api_key):
            problems.append("api_key must be printable ASCII without spaces")
        if problems:
            raise UsageError("; ".join(problems))
        _check_line_size("max_body_size", self.max_body_size)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The training data. See docs/finetune.md for the formats of files and records."""

    files: tuple[str, ...] = option(
        flag="--data", metavar="FILE", help="JSON lines, parquet or text: a file, directory, pattern or address; repeatable"
    )
    eval_files: tuple[str, ...] = option((), flag="--eval-data", metavar="FILE", help="evaluation data in the same formats")
    max_length: int = option(1024, metavar="N", help="the most tokens of a sequence; at most the model's context")
    packing: bool = option(True, help="put several sequences into one row")
    raw: bool = option(False, help="leave the chat template out of prompts and completions")
    bad_records: Literal["refuse", "skip"] = option("refuse", help="what to do with records that cannot be used")
    max_line_size: str = option(
        "64MB", metavar="SIZE", help="the most bytes of a line, of a row of a parquet file or of a plain text"
    )
    seed: int = option(0, metavar="N", help="random seed of the shuffle")

    def __post_init__(self) -> None:
        _check_line_size("data.max_line_size", self.max_line_size)


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters."""

    rank: int = option(16, metavar="N", help="rank of the adapters")
    alpha: float = option(32.0, metavar="A", help="an adapter's output is scaled by alpha / rank")
    use_rslora: bool = option(False, help="scale by alpha / √rank instead")
    target_modules: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        help="linear layers that get an adapter: names, regular expressions, or all-linear for all of them",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimiser and its schedule. The learning rate rises linearly in the warm-up, then follows `schedule`."""

    name: Literal["adamw", "adafactor", "muon"] = option("adamw", help="the optimiser")
    learning_rate: float | None = option(
        None, flag="--learning-rate", metavar="R", help="peak learning rate (lora 2e-4, full 1e-5)"
    )
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", help="of the learning rate after the warm-up")
    warmup_steps: int = option(0, metavar="N", help="steps of the warm-up")
    warmup_ratio: float = option(
        0.0, metavar="R", help="warm-up as a fraction of the run, rounded up, as in transformers; only without warmup_steps"
    )
    min_lr_ratio: float = option(
        0.0, metavar="R", help="the linear and cosine schedules end at this fraction of the learning rate"
    )
    weight_decay: float = option(0.0, metavar="W", help="decoupled weight decay, on matrices only")
    clip_norm: float = option(1.0, metavar="N", help="bound on the global gradient norm; 0 for none")
    b1: float = option(0.9, metavar="B", help="decay of the first moment; also Muon's momentum")
    b2: float = option(0.999, metavar="B", help="decay of the second moment")
    eps: float = option(1e-8, metavar="E", help="added to the denominator of the update")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """`qwen-dist finetune`."""

    model: TrainedModelOptions
    data: DataOptions
    output: str = option(
        flag="--output", metavar="DIR", help="for checkpoints, metrics and the result; an existing run is resumed"
    )
    method: Literal["full", "lora"] = option("lora", flag="--method", help="train all parameters or low-rank adapters")
    chat: ChatOptions = ChatOptions()
    lora: LoraOptions = LoraOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    mesh: str = _mesh()
    batch_size: int = option(8, flag="--batch-size", metavar="N", help="rows per step, on all devices together")
    num_microbatches: int = option(
        1, metavar="N", help="micro-batches that a batch is divided into; their gradients are accumulated"
    )
    steps: int = option(0, flag="--steps", metavar="N", help="number of steps, instead of config.epochs (1)")
    epochs: float = option(1.0, metavar="N", help="passes over the data, if steps is 0")
    remat: Literal["none", "selective", "full"] = option(
        "none",
        help="what the backward pass recomputes: nothing, all but the outputs of matmuls with weights, or whole blocks",
    )
    master_weights: bool = option(
        True,
        help="keep the trained parameters in at least float32 and compute in model.dtype; otherwise train in model.dtype",
    )
    save_every: int = option(0, metavar="N", help="steps between checkpoints; 0 for one at the end")
    max_to_keep: int = option(2, metavar="N", help="the newest checkpoints that are kept")
    keep_best: bool = option(False, help="also keep the checkpoint with the lowest evaluation loss")
    eval_every: int = option(0, metavar="N", help="steps between evaluations; 0 for one at the end")
    tensorboard: bool = option(False, help="also write the metrics for TensorBoard")
    overwrite: bool = option(False, flag="--overwrite", help="start over if the run exists")

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
        if self.method == "full" and self.model.quantize not in ("stored", "none"):
            problems.append(
                f"--quantize {self.model.quantize} is for --method lora; --method full trains the weights themselves"
            )
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


@dataclasses.dataclass(frozen=True)
class InspectModelOptions(LoadOptions):
    """The checkpoint to inspect; none with `kernels`."""

    path: str = option("", flag="DIR_OR_HUB_ID", help="checkpoint in the Hugging Face format")


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """`qwen-dist inspect`."""

    model: InspectModelOptions = InspectModelOptions()
    mesh: str = _mesh()
    kernels: bool = option(False, flag="--kernels", help="show which implementation of each operation runs where")

    def __post_init__(self) -> None:
        if not self.model.path and not self.kernels:
            raise UsageError("model.path is missing; give DIR_OR_HUB_ID, or --kernels")


@dataclasses.dataclass(frozen=True)
class ExportModelOptions(LoadOptions):
    """The model to export. Nothing is computed, so float16 is possible, too."""

    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = option(  # type: ignore[assignment]
        None, flag="--dtype", metavar="DTYPE", help="of the saved weights, by default as stored"
    )
    adapter: str = _adapter()


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """`qwen-dist export`."""

    model: ExportModelOptions
    output: str = option(flag="--output", metavar="DIR", help="the new checkpoint; written whole or not at all")
    mesh: str = _mesh()
    max_shard_size: str = option("5GB", flag="--max-shard-size", metavar="SIZE", help="the most bytes of a weight file")
    overwrite: bool = option(False, flag="--overwrite", help="replace an existing checkpoint")


@dataclasses.dataclass(frozen=True)
class QuantizeModelOptions(LoadOptions):
    """The model to quantise."""

    quantize: Literal["int8", "int4", "fp8"] = option(
        "int4", flag="--quantize", metavar="FORM", help="the weights of linear layers and experts as"
    )
    quantize_group_size: int | None = _group_size()


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """`qwen-dist quantize`."""

    model: QuantizeModelOptions
    output: str = option(flag="--output", metavar="DIR", help="the new checkpoint; written whole or not at all")
    calibration: str = option(
        "",
        flag="--calibration",
        metavar="TEXT_FILE",
        help="round the weights of linear layers for small errors of their outputs on this text (GPTQ)",
    )
    calibration_tokens: int = option(8192, metavar="N", help="the most tokens of the text that --calibration uses")
    mesh: str = _mesh()
    max_shard_size: str = option("5GB", flag="--max-shard-size", metavar="SIZE", help="the most bytes of a weight file")
    overwrite: bool = option(False, flag="--overwrite", help="replace an existing checkpoint")

    def __post_init__(self) -> None:
        problems = []
        if self.calibration and self.model.quantize == "fp8":
            problems.append("--calibration is for --quantize int8 and int4; it is fp8")
        if self.calibration_tokens < 2:
            problems.append(f"calibration_tokens is {self.calibration_tokens}; it must be at least 2")
        if problems:
            raise UsageError("\n".join(problems))


@dataclasses.dataclass(frozen=True)
class PreflightModelOptions(LoadOptions):
    """The checkpoint that all hosts must have; empty for none."""

    path: str = option("", flag="--model", metavar="DIR_OR_HUB_ID", help="a checkpoint that must be the same on all hosts")


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """`qwen-dist preflight`."""

    model: PreflightModelOptions = PreflightModelOptions()
    mesh: str = _mesh()


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """`qwen-dist doctor`."""

    dtype: Literal["bfloat16", "float32", "float64"] = option(
        "bfloat16", flag="--dtype", metavar="DTYPE", help="of the computation: some settings depend on it"
    )


@dataclasses.dataclass(frozen=True)
class ParityModelOptions(QuantizedOptions, CheckpointOptions):
    """The checkpoint to compare."""

    dtype: Literal["bfloat16", "float32", "float64"] = option(
        "float32", flag="--dtype", metavar="DTYPE", help="of parameters and computation on both sides"
    )
    quantize: Quantize = option(
        "none",
        flag="--quantize",
        metavar="FORM",
        help="for --kl: the weights that are compared with the original ones",
    )
    kv_cache_dtype: KvCacheDtype = option(
        "auto", flag="--kv-cache-dtype", metavar="FORM", help="for --kl: keys and values in the cache"
    )


@dataclasses.dataclass(frozen=True)
class ParityConfig:
    """`qwen-dist parity`. Without `prompts` and `tokens`, built-in texts are compared."""

    model: ParityModelOptions
    mesh: str = _mesh()
    prompts: tuple[str, ...] = option((), flag="--prompt", metavar="TEXT", help="a text to compare on; may be repeated")
    tokens: int | None = option(None, flag="--tokens", metavar="N", help="use N random tokens instead of prompts")
    report: str = option("", flag="--report", metavar="FILE", help="also write an HTML page")
    kl: str = option(
        "", flag="--kl", metavar="TEXT_FILE", help="compare the next-token distributions of two models over this text"
    )
    kl_reference: str = option(
        "",
        flag="--kl-reference",
        metavar="DIR_OR_HUB_ID",
        help="the model that --kl compares with; default: --model itself, dequantised",
    )
    kl_tokens: int = option(4096, metavar="N", help="the most tokens of the text that --kl compares")

    def __post_init__(self) -> None:
        is_quantized = self.model.quantize != "none" or self.model.kv_cache_dtype != "auto"
        if not self.kl and (self.kl_reference or is_quantized):
            raise UsageError("--kl-reference, --quantize and --kv-cache-dtype are for --kl TEXT_FILE")
        if self.kl and (self.prompts or self.tokens is not None or self.report):
            raise UsageError("--prompt, --tokens and --report cannot be used with --kl TEXT_FILE: leave them out")
        if self.kl and not is_quantized and self.kl_reference in ("", self.model.path):
            raise UsageError(
                "--kl compares two models: give --quantize, --kv-cache-dtype, or another one with --kl-reference"
            )
        if self.kl_tokens < 2:
            raise UsageError(f"kl_tokens is {self.kl_tokens}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class PlanModelOptions(QuantizedOptions, CheckpointOptions):
    """The model to plan for."""

    quantize: Quantize = option(
        "stored",
        flag="--quantize",
        metavar="FORM",
        help="the weights of linear layers and experts, in batch inference and under adapters",
    )


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """`qwen-dist plan`."""

    model: PlanModelOptions
    topology: str = option(flag="--topology", metavar="KIND:SIZES", help="such as v5e:8x8, v5p:4x4x4 or cpu:8")
    command: Literal["batch", "finetune"] = option("batch", flag="--command", help="what to run")
    mesh: str = _mesh()
    batch_size: int = option(32, flag="--batch-size", metavar="N", help="sequences on all devices together")
    context: int = option(4096, flag="--context", metavar="N", help="tokens per sequence, answer included")
    method: Literal["lora", "full"] = option("lora", flag="--method", help="what finetune trains")
    remat: Literal["none", "selective", "full"] = option(
        "full", flag="--remat", metavar="REMAT", help="what finetune recomputes"
    )
    lora: LoraOptions = LoraOptions()
    compile: str | None = option(
        None,
        flag="--compile",
        metavar="A,B",
        const="all",
        help="run the compiler; A,B: extrapolate from A and B layers; auto: choose both",
    )
    chart: str = option("", flag="--chart", metavar="FILE", help="also write an HTML page with the memory of each device")


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


def _give(field: dataclasses.Field[Any]) -> str:
    about: Option = field.metadata.get("option", Option())
    return f"; give {about.flag}" if about.flag else ""


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
                problems.append(f"{prefix}{name} is missing{_give(field)}")
            values[name] = field.default
        else:
            values[name] = _convert(kind, value, prefix + name, problems)
    return None if problems else cls(**values)


_NO_FLOAT16 = (
    " (activations of Qwen models exceed 65504, the largest float16; devices without bfloat16 can use float32, and export "
    "writes float16)"
)


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    kinds = alternatives(kind)
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
    problems.append(f"{name} is {printable(repr(value), 120)}; it must be {' or '.join(map(describe_type, kinds))}{reason}")
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
