"""The command line: `qwen-dist COMMAND …`. It turns flags into a configuration, runs the command and prints the result.

Exit codes: 0 done (of a batch also when records have an error), 1 failed, 2 wrong usage, 75 stopped by SIGTERM after saving
(finetune), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import qwen_dist
from qwen_dist.chat import make_chat
from qwen_dist.command_parser import CommandParser, check_command, describe_unknown
from qwen_dist.config import (
    BatchConfig,
    ExportModelOptions,
    FinetuneConfig,
    GenerateConfig,
    LoraOptions,
    ModelOptions,
    load_config,
    parse_bytes,
)
from qwen_dist.errors import UsageError, UserError, printable, printable_lines
from qwen_dist.failures import describe_failure
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import COMPILATION_CACHE, find_devices, start_jax
from qwen_dist.version import VersionAction

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_dist.batch.run import BatchSummary
    from qwen_dist.engine.engine import Engine, EngineStats
    from qwen_dist.engine.request import RequestOutput, SamplingParams
    from qwen_dist.runtime.distributed import Processes
    from qwen_dist.tokenizer import Tokenizer

_Flag = tuple[str, str, type, str, str]
# Flags that set a configuration key: (flag, key, type, metavar, help).
_MODEL_FLAGS: tuple[_Flag, ...] = (
    ("--model", "model.path", str, "DIR_OR_HUB_ID", "checkpoint in the Hugging Face format"),
    (
        "--dtype",
        "model.dtype",
        str,
        "DTYPE",
        "bfloat16, float32 or float64 (bfloat16; parity: float32; export: as stored)",
    ),
    ("--mesh", "mesh", str, "AXES", "devices per mesh axis, such as fsdp=2,tensor=4"),
    ("--host-memory-budget", "model.host_memory_budget", str, "SIZE", "bound on the loader's buffers, such as 256MB"),
)
_ADAPTER_FLAG: tuple[_Flag, ...] = (("--adapter", "model.adapter", str, "DIR", "a LoRA adapter in PEFT's format"),)
_SAMPLING_FLAGS: tuple[_Flag, ...] = (
    ("--load-format", "model.load_format", str, "FORMAT", "safetensors (default) or dummy: random weights"),
    ("--max-new-tokens", "sampling.max_new_tokens", int, "N", "the most tokens to generate (512)"),
    ("--temperature", "sampling.temperature", float, "T", "0 always takes the most probable token"),
    ("--top-k", "sampling.top_k", int, "K", "sample from the K most probable tokens; 0 from all"),
    ("--top-p", "sampling.top_p", float, "P", "sample from the fewest tokens with total probability P"),
    ("--min-p", "sampling.min_p", float, "P", "drop tokens below P times the highest probability"),
    ("--repetition-penalty", "sampling.repetition_penalty", float, "R", "above 1 makes earlier tokens less likely"),
    ("--presence-penalty", "sampling.presence_penalty", float, "P", "subtracted once from tokens that the answer has"),
    ("--frequency-penalty", "sampling.frequency_penalty", float, "P", "subtracted for each time the answer has the token"),
    ("--seed", "sampling.seed", int, "N", "random seed; the same seed gives the same tokens"),
    ("--stop", "sampling.stop", str, "TEXT", "stop before this text; may be repeated"),
    ("--logprobs", "sampling.logprobs", int, "N", "log-probabilities, with the N best alternatives"),
)

_CHAT_FLAGS: tuple[_Flag, ...] = (
    ("--thinking", "chat.thinking", str, "on|off", "sets enable_thinking of the chat template, as Qwen3's has"),
    ("--template-arg", "chat.template_args", str, "NAME=VALUE", "sets a variable of the chat template; may be repeated"),
)
_TRAINING_FLAGS: tuple[_Flag, ...] = (
    ("--load-format", "model.load_format", str, "FORMAT", "safetensors (default) or dummy: from random weights"),
    ("--data", "data.files", str, "FILE", "JSON lines, parquet or text; may be repeated and contain *"),
    ("--eval-data", "data.eval_files", str, "FILE", "evaluation data in the same formats"),
    ("--output", "output", str, "DIR", "for checkpoints, metrics and the result; an existing run is resumed"),
    ("--method", "method", str, "METHOD", "lora (default) or full"),
    ("--steps", "steps", int, "N", "number of steps, instead of config.epochs (1)"),
    ("--batch-size", "batch_size", int, "N", "rows per step, on all devices together (8)"),
    ("--learning-rate", "optimizer.learning_rate", float, "R", "peak learning rate (lora 2e-4, full 1e-5)"),
)

_EXIT_SIGTERM = 75  # EX_TEMPFAIL: the same command resumes the run
_EXIT_INTERRUPTED = 130

# The small model in the package, for when no other is given.
_DEMO_MODEL = {"model.path": str(pathlib.Path(qwen_dist.__file__).parent / "demo" / "model")}

# How long processes wait for each other before the preflight reports which are missing.
_START_TIMEOUT_S = 60.0
_TABLE_WIDTH = 160
_MAX_PROMPT_BYTES = 2**26

_GENERATE_EXAMPLE = """\
examples:
  qwen-dist generate --prompt "Why is the sky blue?"      with the small demonstration model
  qwen-dist generate --model ~/qwen3-0.6b                 a chat; Ctrl-D ends it
  echo "Say hi" | qwen-dist generate --model Qwen/Qwen3-0.6B --temperature 0 --json
  qwen-dist generate --model ~/qwen3-8b --mesh tensor=4 --config.sampling.top_k=20
defaults of the sampling flags come from the checkpoint's generation_config.json"""

_BATCH_EXAMPLE = """\
example:
  qwen-dist batch --config configs/batch.py --model ~/qwen3-0.6b --input in.jsonl --output out.jsonl"""


_FINETUNE_EXAMPLE = """\
examples:
  qwen-dist finetune --config configs/finetune_lora.py --model ~/qwen3-0.6b --data chats.jsonl --output run --steps 100
  qwen-dist finetune --config configs/finetune_full.py --model ~/qwen3-0.6b --data chats.jsonl --output run --dry-run
  qwen-dist finetune --model ~/qwen3-0.6b --data chats.jsonl --output run --show-data 2
  qwen-dist generate --model ~/qwen3-0.6b --adapter run/adapter
an interrupted run resumes from its newest checkpoint; SIGTERM saves first (exit code 75)"""

_PREFLIGHT_EXAMPLE = """\
examples, the same command on every host:
  qwen-dist preflight --model ~/qwen3-8b --mesh fsdp=2,tensor=8          on a TPU pod, GKE or Slurm
  qwen-dist preflight --coordinator host-a:8482 --num-processes 2 --process-id 0
every run with several processes starts with the same checks"""

_INSPECT_EXAMPLE = """\
examples:
  qwen-dist inspect ~/qwen3-0.6b
  qwen-dist inspect Qwen/Qwen3-8B --mesh fsdp=4,tensor=2 --json
  qwen-dist inspect --kernels                            the operations, and what runs on this machine
reads headers and configuration only; exit code 1 if there are problems"""

_EXPORT_EXAMPLE = """\
example:
  qwen-dist export --model ~/qwen3-8b --output ~/qwen3-8b-float32 --dtype float32 --max-shard-size 2GB"""

_PARITY_EXAMPLE = """\
examples:
  qwen-dist parity --model ~/qwen3-0.6b --dtype float32
  qwen-dist parity --model ~/qwen3-0.6b --dtype bfloat16 --prompt "Why is the sky blue?" --report parity.html
exit code 1 if a component differs by more than its bound; needs the extra: pip install 'qwen-dist[parity]'"""


_PLAN_EXAMPLE = """\
examples:
  qwen-dist plan --model ~/qwen3-32b --topology v5e:8x8 --command batch --batch-size 64 --context 4096
  qwen-dist plan --model config.json --topology v6e:4x4 --mesh fsdp=16 --command finetune --method full --compile 3,5
  qwen-dist plan --model ~/qwen3-0.6b --topology cpu:8 --mesh data=2,tensor=4 --compile
reads config.json only; --compile for a TPU needs libtpu (pip install libtpu) but no TPU; exit code 1 if it does not fit"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parser()
    name = "qwen-dist"
    try:
        check_command(given, commands)
        options, unknown = parser.parse_known_args(given)
        name = f"qwen-dist {options.command}"
        overrides = [argument for argument in unknown if argument.startswith("--config.")]
        if wrong := [argument for argument in unknown if argument not in overrides]:
            command = commands[options.command]
            raise UsageError(describe_unknown(wrong, command.flags, options.command))
        return options.run(options, overrides)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, CommandParser]]:
    parser = CommandParser(prog="qwen-dist", description="Run and fine-tune Qwen text models in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=VersionAction)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    _add_generate(commands)
    _add_batch(commands)
    _add_finetune(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_preflight(commands)
    _add_parity(commands)
    _add_plan(commands)
    return parser, dict(commands.choices)


def _add_generate(commands: Any) -> None:
    generate = _add_command(commands, "generate", _generate, "answer a prompt, or chat", _GENERATE_EXAMPLE)
    generate.add_argument("--prompt", metavar="TEXT", help="default: standard input, or a chat in a terminal")
    generate.add_argument("--system", metavar="TEXT", help="the system message")
    generate.add_argument("--raw", action="store_true", help="do not apply the chat template")
    _add_run_flags(generate)
    _add_host_flags(generate)


def _add_batch(commands: Any) -> None:
    batch = _add_command(commands, "batch", _batch, "answer every line of a file", _BATCH_EXAMPLE)
    batch.add_argument(
        "--input", metavar="FILE", help='lines {"id","prompt"}, {"id","messages"} or of OpenAI\'s API; .gz, .zst, .parquet'
    )
    batch.add_argument("--output", metavar="FILE", help="in the same formats; an interrupted run is resumed")
    batch.add_argument(
        "--max-batch-size",
        dest="engine.max_batch_size",
        type=int,
        metavar="N",
        help="the most requests at the same time (96)",
    )
    batch.add_argument(
        "--num-replicas", type=int, metavar="N", help="divide the processes into N replicas of the whole model (1)"
    )
    batch.add_argument("--raw", action="store_true", default=None, help="do not apply the chat template")
    batch.add_argument("--overwrite", action="store_true", default=None, help="start over if results exist")
    batch.add_argument("--retry-errors", action="store_true", default=None, help="retry records that ended in an error")
    batch.add_argument("--keep-order", action="store_true", default=None, help="write results in the order of the input")
    batch.add_argument("--chart", metavar="FILE", help="write an HTML page: throughput, requests and cache over time")
    batch.add_argument("--max-line-size", metavar="SIZE", help="longer input lines are answered with an error (64MB)")
    batch.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics during the run")
    batch.add_argument("--metrics-host", metavar="ADDRESS", help="serve them on this address (127.0.0.1)")
    batch.add_argument("--profile", metavar="DIR", help="write a trace of the first seconds, for TensorBoard or XProf")
    _add_run_flags(batch)
    _add_host_flags(batch)


def _add_finetune(commands: Any) -> None:
    finetune = _add_command(commands, "finetune", _finetune, "train a model or an adapter on your data", _FINETUNE_EXAMPLE)
    finetune.add_argument("--show-data", type=int, metavar="N", help="print N examples with the loss mask, and exit")
    finetune.add_argument("--dry-run", action="store_true", help="print what would be trained, and exit")
    finetune.add_argument("--overwrite", action="store_true", default=None, help="start over if the run exists")
    _add_flags(finetune, _MODEL_FLAGS + _ADAPTER_FLAG + _CHAT_FLAGS + _TRAINING_FLAGS)
    _add_device_flag(finetune)
    finetune.add_argument(
        "--config", metavar="FILE[:ARG]", help="a .py, .yaml or .json file; --config.key=value sets a key"
    )
    _add_host_flags(finetune)


def _add_inspect(commands: Any) -> None:
    inspect = _add_command(
        commands, "inspect", _inspect, "show what a checkpoint holds and what loading costs", _INSPECT_EXAMPLE
    )
    inspect.usage = "qwen-dist inspect DIR_OR_HUB_ID [flags] | qwen-dist inspect --kernels"
    inspect.add_argument("model.path", metavar="DIR_OR_HUB_ID", nargs="?", help="checkpoint in the Hugging Face format")
    inspect.add_argument("--kernels", action="store_true", help="show which implementation of each operation runs where")
    _add_flags(inspect, _MODEL_FLAGS[1:])
    _add_device_flag(inspect)


def _add_export(commands: Any) -> None:
    export = _add_command(
        commands, "export", _export, "load a checkpoint and save it in the format of transformers", _EXPORT_EXAMPLE
    )
    export.add_argument("--output", metavar="DIR", required=True, help="the new checkpoint; written whole or not at all")
    export.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="the most bytes of a weight file (5GB)")
    export.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    _add_flags(export, _MODEL_FLAGS + _ADAPTER_FLAG)
    _add_device_flag(export)
    _add_host_flags(export)


def _add_preflight(commands: Any) -> None:
    preflight = _add_command(
        commands, "preflight", _preflight, "check processes and devices before a run", _PREFLIGHT_EXAMPLE
    )
    _add_flags(preflight, _MODEL_FLAGS)
    _add_device_flag(preflight)
    _add_host_flags(preflight)


def _add_parity(commands: Any) -> None:
    parity = _add_command(commands, "parity", _parity, "compare with PyTorch, component by component", _PARITY_EXAMPLE)
    parity.add_argument("--prompt", action="append", metavar="TEXT", help="a text to compare on; may be repeated")
    parity.add_argument("--tokens", type=int, metavar="N", help="use N random tokens instead of prompts")
    parity.add_argument("--report", metavar="FILE", help="also write an HTML page")
    _add_flags(parity, _MODEL_FLAGS[:3])
    _add_device_flag(parity)


def _add_plan(commands: Any) -> None:
    plan = _add_command(commands, "plan", _plan, "estimate memory and speed of a model on any devices", _PLAN_EXAMPLE)
    plan.usage = "qwen-dist plan --model DIR_OR_HUB_ID --topology KIND:SIZES [flags]"
    plan.add_argument("--topology", metavar="KIND:SIZES", required=True, help="such as v5e:8x8, v5p:4x4x4 or cpu:8")
    plan.add_argument(
        "--command", dest="workload", choices=("batch", "finetune"), default="batch", help="what to run (batch)"
    )
    plan.add_argument("--batch-size", type=int, metavar="N", default=32, help="sequences on all devices together (32)")
    plan.add_argument("--context", type=int, metavar="N", default=4096, help="tokens per sequence, answer included (4096)")
    plan.add_argument("--method", choices=("lora", "full"), default="lora", help="for finetune (lora)")
    plan.add_argument("--remat", choices=("none", "selective", "full"), default="full", help="for finetune (full)")
    plan.add_argument(
        "--compile",
        nargs="?",
        const="all",
        metavar="A,B",
        help="run the compiler; A,B: extrapolate from A and B layers; auto: choose both",
    )
    plan.add_argument("--chart", metavar="FILE", help="also write an HTML page with the memory of each device")
    _add_flags(plan, _MODEL_FLAGS[:3])


def _add_command(
    commands: Any, name: str, run: Callable[..., int], description: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=example,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        usage=f"qwen-dist {name} --model DIR_OR_HUB_ID [flags]",
    )
    command.set_defaults(run=run)
    return command


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    _add_flags(command, _MODEL_FLAGS + _ADAPTER_FLAG + _CHAT_FLAGS + _SAMPLING_FLAGS)
    _add_device_flag(command)
    command.add_argument("--config", metavar="FILE[:ARG]", help="a .py, .yaml or .json file; --config.key=value sets a key")


def _add_device_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-cpu-devices", type=int, metavar="N", help="run on N CPU devices of this machine")


def _add_host_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of a run with several processes. On TPU pods, GKE and Slurm the cluster sets these."""
    command.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (default: from the cluster)")
    command.add_argument("--num-processes", type=int, metavar="N", help="how many processes run this command")
    command.add_argument("--process-id", type=int, metavar="I", help="the number of this process, from 0")
    wait = os.environ.get("QWEN_DIST_START_TIMEOUT", _START_TIMEOUT_S)
    command.add_argument("--start-timeout", type=float, default=wait, metavar="S", help="seconds to wait for them (60)")


def _add_flags(command: argparse.ArgumentParser, flags: Sequence[_Flag]) -> None:
    for flag, key, kind, metavar, help in flags:
        action = "append" if flag in ("--stop", "--data", "--eval-data", "--template-arg") else "store"
        command.add_argument(flag, dest=key, type=kind, metavar=metavar, help=help, action=action)
    command.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _config_values(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    keys = [key for _, key, *_ in _MODEL_FLAGS + _ADAPTER_FLAG + _CHAT_FLAGS + _SAMPLING_FLAGS] + list(more)
    return {key: value for key in keys if (value := getattr(options, key, None)) is not None}


@contextlib.contextmanager
def _joined(
    options: argparse.Namespace, config: Any, *, num_replicas: int = 1, input: str | None = None, **more: Any
) -> Iterator[Processes]:
    """Run the block as one of several processes, if there are several: after the preflight, with stdout on process 0 only.

    `config`, `more` and the content of the file `input` must be the same on all processes.
    """
    from qwen_dist.runtime.cluster import detect_cluster

    cluster = detect_cluster(options.coordinator, options.num_processes, options.process_id, os.environ)
    from qwen_dist.runtime.distributed import Processes, initialize_distributed
    from qwen_dist.runtime.preflight import collect_host_info

    if cluster is None:
        yield Processes()
        return
    model: ModelOptions = config.model
    on_host = bool(options.num_cpu_devices) or os.environ.get("JAX_PLATFORMS") == "cpu"
    copies = {"bfloat16": 1, "float16": 1, "float32": 2, "float64": 4}[model.dtype] * num_replicas / cluster.num_processes
    host_info = collect_host_info(
        {"command": options.command, **vars(config), **more},
        checkpoint=model.path,
        input=input,
        write_dirs=[os.environ.get("JAXCOMPILATION_CACHE_DIR") or COMPILATION_CACHE],
        memory_per_checkpoint_byte=copies if on_host and model.load_format != "dummy" else 0.0,
    )
    with (
        _redirect_stdout(cluster.process_id),
        initialize_distributed(cluster, host_info, options.start_timeout) as processes,
    ):
        yield processes


@contextlib.contextmanager
def _redirect_stdout(process_id: int) -> Iterator[None]:
    """Send Python's output to stdout on process 0 only, and what libraries write to stdout to stderr.

    Gloo, the library for collectives between CPU processes, writes about its connections to file descriptor 1.
    """
    sys.stdout.flush()
    answers = os.dup(1) if process_id == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    with os.fdopen(answers, "w", encoding=sys.stdout.encoding) as out, contextlib.redirect_stdout(out):
        yield


# --- generate ---


def _generate(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(GenerateConfig, options.config, overrides, _config_values(options), _DEMO_MODEL)
    variables = config.chat.variables
    if options.raw and variables:
        raise UsageError("--thinking and --template-arg set variables of the chat template, which --raw leaves out")
    prompt = options.prompt
    if prompt is None and sys.stdin is None:
        raise UsageError("standard input is closed; give --prompt")
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_prompt()
    if prompt is None and options.json:
        raise UsageError("--json needs --prompt, or the prompt on standard input")
    with _joined(options, config, prompt=prompt, system=options.system, raw=options.raw) as processes:
        if prompt is None and processes.count > 1:
            raise UsageError("a chat needs a single process; with several, give --prompt to all of them")
        start_jax(options.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        from qwen_dist.chat_session import ChatSession, system_messages
        from qwen_dist.engine.open import open_engine

        quiet = options.json or not processes.is_main
        with _loading(quiet=quiet) as progress:
            engine, tokenizer, sampling = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=1,
                template_variables=variables,
                progress=progress,
                announce=_announcer(processes, quiet=quiet),
            )
        if prompt is None:
            chat_sampling = sampling.override({"stop_token_ids": tokenizer.chat_stop_ids})
            session = ChatSession(
                lambda messages: tokenizer.encode_prompt(make_chat(messages, None, variables), engine.max_context),
                lambda ids: _respond(engine, tokenizer, chat_sampling, ids, as_json=False),
                engine.max_context,
                options.system,
            )
            return session.run(config.model.path)
        if options.raw:
            tokenizer.check_length(prompt, engine.max_context)
            ids = tokenizer.encode(prompt)
        else:
            chat = make_chat([*system_messages(options.system), {"role": "user", "content": prompt}], None, variables)
            ids = tokenizer.encode_prompt(chat, engine.max_context)
            sampling = sampling.override({"stop_token_ids": tokenizer.chat_stop_ids})
        _respond(engine, tokenizer, sampling, ids, as_json=options.json)
    return 0


def _read_prompt() -> str:
    """Return standard input without the newline at its end, which `echo` adds."""
    try:
        content = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    except OSError as error:  # such as one that is open for writing only
        raise UsageError(f"standard input cannot be read: {error.strerror}; give --prompt") from None
    if len(content) > _MAX_PROMPT_BYTES:
        raise UserError(f"standard input has more than {_MAX_PROMPT_BYTES} bytes")
    try:
        prompt = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start + 1}); give the prompt in UTF-8") from None
    return prompt.removesuffix("\n").removesuffix("\r") if prompt.endswith("\n") else prompt


def _respond(engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, ids: Sequence[int], *, as_json: bool) -> str:
    """Stream one answer to standard output, or print it as one JSON object. Return its text."""
    from qwen_dist.engine.request import Request

    updates: list[RequestOutput] = []
    start, first = time.monotonic(), 0.0
    for update in engine.run([Request(None, tuple(ids), sampling)]):
        first = first or time.monotonic()
        updates.append(update)
        if not as_json:
            print(update.text, end="", flush=True)
    last, end = updates[-1], time.monotonic()
    text = "".join(update.text for update in updates)
    if as_json:
        print(json.dumps(_output_json(text, updates, tokenizer), ensure_ascii=False))
        return text
    print()
    if sys.stderr.isatty():
        speed = (last.num_generated - 1) / max(end - first, 1e-9)
        print(
            f"[{len(ids)} prompt tokens, {last.num_generated} generated; first token after {first - start:.1f} s, "
            f"then {speed:.1f} tokens/s; finish reason: {last.finish_reason}]",
            file=sys.stderr,
        )
    return text


def _output_json(text: str, updates: list[RequestOutput], tokenizer: Tokenizer) -> dict[str, Any]:
    from qwen_dist.batch.run import logprob_json

    last = updates[-1]
    answer: dict[str, Any] = {
        "text": text,
        "finish_reason": last.finish_reason,
        "token_ids": [token for update in updates for token in update.tokens],
        "usage": {"prompt_tokens": len(last.request.prompt), "completion_tokens": last.num_generated},
    }
    if last.request.params.logprobs is not None:
        answer["logprobs"] = [logprob_json(token, tokenizer) for update in updates for token in update.logprobs]
    return answer


# --- batch ---


def _batch(options: argparse.Namespace, overrides: list[str]) -> int:
    names = ("input", "output", "engine.max_batch_size", "num_replicas", "raw", "overwrite", "retry_errors", "keep_order")
    values = _config_values(options, *names, "chart", "max_line_size", "metrics_port", "metrics_host", "profile")
    config = load_config(BatchConfig, options.config, overrides, values, _DEMO_MODEL)
    if "://" not in config.input and not os.path.exists(config.input):
        raise UsageError(f"cannot read the input {printable(config.input)}: there is no such file; give --input")
    with _joined(options, config, num_replicas=config.num_replicas, input=config.input) as processes:
        if processes.is_main:
            _check_batch_paths(config, options.config)
        start_jax(options.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        # Ctrl-C handling is for one process only: several would have to stop at the same record.
        with contextlib.nullcontext(lambda: False) if processes.count > 1 else _catch_interrupt() as stopped:
            summary = _run_shard(config, processes, stopped, quiet=options.json or not processes.is_main)
            _print_summary(summary, config, is_complete=not stopped(), as_json=options.json)
            return _EXIT_INTERRUPTED if stopped() else 0


def _check_batch_paths(config: BatchConfig, config_file: str | None) -> None:
    from qwen_dist.batch.manifest import check_manifest
    from qwen_dist.batch.output import paths_written

    written = paths_written(config.output)
    written.append(Written("--chart", config.chart, is_page=True))
    written.append(Written("--profile", config.profile, is_directory=True))
    if not ("://" in config.input or os.path.exists(config.input)):
        raise UsageError(f"cannot read the input {printable(config.input)}: there is no such file; name one with --input")
    check_paths({"--input": config.input} | _paths_read(config.model, config_file), written)
    check_manifest(config.output)


def _paths_read(model: ModelOptions, config_file: str | None = None) -> dict[str, str]:
    """Return the paths that a command reads besides its data, by flag."""
    return {"--model": model.path, "--adapter": model.adapter or "", "--config": (config_file or "").partition(":")[0]}


@contextlib.contextmanager
def _catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. A second Ctrl-C ends the program at once.

    It does not raise KeyboardInterrupt, which is lost if it comes while a callback of jax's garbage collector runs. The
    journal says up to where the output is complete.
    """
    interrupted = False

    def stop(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            os.write(2, b"\ninterrupted\n")
            os._exit(_EXIT_INTERRUPTED)
        interrupted = True
        os.write(2, b"\nstopping after the running requests are finished; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _run_shard(config: BatchConfig, processes: Processes, stopped: Callable[[], bool], *, quiet: bool) -> BatchSummary:
    """Run this process's shard of a batch. On process 0 the summary counts all processes."""
    from qwen_dist.batch.manifest import result_settings, write_manifest
    from qwen_dist.batch.progress import batch_progress
    from qwen_dist.batch.run import BatchSummary, run_batch
    from qwen_dist.batch.shard import open_shard
    from qwen_dist.engine.open import open_engine
    from qwen_dist.runtime.distributed import assign_replica

    replica, settings = assign_replica(processes, config.num_replicas), result_settings(config)
    shard = open_shard(
        config.input,
        config.output,
        processes,
        replica,
        settings=json.dumps(settings),
        overwrite=config.overwrite,
        retry_errors=config.retry_errors,
        keep_order=config.keep_order,
        max_line_bytes=parse_bytes(config.max_line_size),
    )
    with shard as (records, results), _monitors(config, processes, quiet=quiet) as watch:
        with _loading(quiet=quiet) as progress:
            engine, tokenizer, sampling = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=config.engine.max_batch_size,
                cache_bytes=parse_bytes(config.engine.kv_cache_memory),
                steps_per_dispatch=config.engine.steps_per_dispatch,
                policy=config.engine.policy,
                template_variables=config.chat.variables,
                devices=replica.devices(),
                progress=progress,
                announce=_announcer(processes, quiet=quiet),
            )
        if processes.is_main:
            write_manifest(config, settings, BatchSummary(num_before=results.num_before), is_complete=False)
        with batch_progress(config, results.num_before, _console(stderr=True, quiet=quiet)) as show:

            def report(summary: BatchSummary, stats: EngineStats) -> None:
                results.collect()
                show(summary, stats)
                watch(summary, stats)

            summary = run_batch(
                engine,
                tokenizer,
                sampling,
                records,
                results,
                raw=config.raw,
                variables=config.chat.variables,
                report=report,
                should_stop=stopped,
            )
        summary = results.finish(summary, not stopped())
    if processes.is_main:
        write_manifest(config, settings, summary, is_complete=not stopped())
    return summary


def _print_summary(summary: BatchSummary, config: BatchConfig, *, is_complete: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"output": config.output, **vars(summary)}))
        return
    from qwen_dist.batch.progress import count_errors, count_left, describe_summary

    kinds = count_errors(config.output) if summary.num_errors else {}
    num_left = None if is_complete else count_left(config.input, summary)
    print(describe_summary(summary, config.output, kinds, num_left=num_left))


@contextlib.contextmanager
def _monitors(
    config: BatchConfig, processes: Processes, *, quiet: bool
) -> Iterator[Callable[[BatchSummary, EngineStats], None]]:
    """Yield the callback for the monitors that the configuration enables: metrics, profile, chart; print a final table."""
    from qwen_dist.batch.metrics import metrics_server
    from qwen_dist.batch.progress import series_table
    from qwen_dist.batch.series import TimeSeries, write_chart
    from qwen_dist.engine.profile import profiling

    series = TimeSeries()
    with contextlib.ExitStack() as stack:
        watches: list[Callable[[BatchSummary, EngineStats], None]] = [series.add]
        if processes.is_main and config.chart:
            stack.callback(write_chart, config.chart, series)
        if processes.is_main and config.metrics_port is not None:
            watches.append(stack.enter_context(metrics_server(config.metrics_port, config.metrics_host)))
        if processes.is_main and config.profile:
            tick = stack.enter_context(profiling(config.profile))
            watches.append(lambda summary, stats: tick())

        def watch(summary: BatchSummary, stats: EngineStats) -> None:
            for one in watches:
                one(summary, stats)

        yield watch
        if len(series.samples) > 1 and series.samples[-1].num_generated_tokens:
            _console(stderr=True, quiet=quiet).print(series_table(series))


# --- finetune ---


def _finetune(options: argparse.Namespace, overrides: list[str]) -> int:
    values = _config_values(options, *(key for _, key, *_ in _TRAINING_FLAGS), "overwrite")
    config = load_config(FinetuneConfig, options.config, overrides, values)
    with _joined(options, config) as processes:
        from qwen_dist.ops.malloc import dispatch_synchronously, keep_freed_memory

        start_jax(options.num_cpu_devices, config.model.dtype)
        dispatch_synchronously()
        processes.check_devices()
        from qwen_dist.train.console import count, describe_data, describe_training, progress_bar, show_data
        from qwen_dist.train.run import finetune, prepare, set_up_abstract

        prepared = prepare(config)
        if options.show_data is not None:
            show_data(prepared, options.show_data, _console())
            return 0
        console = _console(stderr=True, quiet=options.json or not processes.is_main)
        if options.dry_run:
            print(describe_data(prepared))
            print(describe_training(set_up_abstract(prepared), prepared))
            return 0
        console.print(describe_data(prepared), highlight=False, soft_wrap=True)
        keep_freed_memory()

        def log(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        with progress_bar(console, prepared.num_steps) as callback:
            summary = finetune(prepared, callback=callback, log=log)
        if options.json:
            print(json.dumps(vars(summary)))
        elif summary.is_stopped:
            print(f"stopped and saved after step {summary.steps}; the same command resumes the run")
        else:
            loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
            print(f"{count(summary.steps, 'step')}{loss}: {summary.result}")
    return _EXIT_SIGTERM if summary.is_stopped else 0


# --- inspect, export, parity, plan ---


@dataclasses.dataclass(frozen=True)
class _ModelConfig:
    """The configuration of the commands that only read or write a checkpoint."""

    model: ModelOptions
    mesh: str = ""


@dataclasses.dataclass(frozen=True)
class _ExportConfig:
    """The configuration of `export`."""

    model: ExportModelOptions
    mesh: str = ""


def _inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.kernels:
        return _print_kernels(as_json=options.json)
    config = load_config(_ModelConfig, None, overrides, _config_values(options))
    from qwen_dist.mesh import MeshConfig, make_mesh

    mesh = MeshConfig.parse(config.mesh)
    # Nothing is computed, so there can be as many CPU devices as the mesh needs.
    start_jax(options.num_cpu_devices or mesh.num_devices, config.model.dtype)
    find_devices()
    from qwen_dist.checkpoint.inspect import inspect
    from qwen_dist.checkpoint.model import abstract_model
    from qwen_dist.sharding import INFERENCE, ShardingContext

    sharding_ctx = ShardingContext(make_mesh(mesh), INFERENCE)
    report = inspect(
        config.model.path,
        lambda hf: abstract_model(hf, sharding_ctx, config.model.dtype, config.model.ignored_keys),
        host_memory_budget=config.model.host_memory_bytes,
    )
    if options.json:
        print(report.to_json())
    else:
        report.print(_console())
    return 1 if report.problems else 0


def _print_kernels(*, as_json: bool) -> int:
    """Print for each operation the implementations that are tried on each backend, and the backends of this machine."""
    import jax

    from qwen_dist.ops import native
    from qwen_dist.ops.dispatch import Backend
    from qwen_dist.ops.table import dispatch_table

    table, _ = dispatch_table(), find_devices()
    here = {phase: Backend.of_platform(jax.default_backend(), 1, phase) for phase in ("inference", "train")}
    features = sorted(native.processor_features())
    if as_json:
        ops = {op: {backend.value: list(names) for backend, names in row.items()} for op, row in table.items()}
        backends = {phase: backend.value for phase, backend in here.items()}
        print(json.dumps({"ops": ops, "this_machine": backends, "processor_features": features}))
        return 0
    from rich.table import Table

    shown = Table("operation", *(backend.value for backend in Backend))
    for op, row in table.items():
        shown.add_row(op, *("\n".join(row[backend]) for backend in Backend))
    console = _console()
    console.print(shown)
    console.print("The first implementation of a cell that takes the arguments runs; the plain form takes all.")
    console.print("This machine, one device: " + ", ".join(f"{phase} {backend.value}" for phase, backend in here.items()))
    console.print(f"Processor features for the kernels: {' '.join(features) or 'none, or the kernels are not compiled'}")
    return 0


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    values = _config_values(options)
    config = load_config(_ExportConfig, None, overrides, values)
    with _joined(options, config, output=options.output) as processes:
        if processes.is_main:
            check_paths(_paths_read(config.model), [Written("--output", options.output, is_directory=True)])
        start_jax(options.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        from qwen_dist.checkpoint.model import export_model
        from qwen_dist.mesh import MeshConfig, make_mesh
        from qwen_dist.sharding import INFERENCE, ShardingContext

        with _loading("exporting", quiet=options.json or not processes.is_main) as progress:
            export_model(
                config.model.path,
                ShardingContext(make_mesh(MeshConfig.parse(config.mesh)), INFERENCE),
                options.output,
                adapter=config.model.adapter,
                dtype=values.get("model.dtype"),
                ignored_config_keys=config.model.ignored_keys,
                max_shard_bytes=parse_bytes(options.max_shard_size),
                overwrite=options.overwrite,
                host_memory_budget=config.model.host_memory_bytes,
                progress=progress,
            )
        print(json.dumps({"output": options.output}) if options.json else f"saved: {options.output}")
    return 0


def _parity(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(_ModelConfig, None, overrides, {"model.dtype": "float32"} | _config_values(options))
    check_paths(_paths_read(config.model), [Written("--report", options.report or "", is_page=True)])
    start_jax(options.num_cpu_devices, config.model.dtype)
    find_devices()
    from qwen_dist.checkpoint.hub import local_directory
    from qwen_dist.parity.page import write_html
    from qwen_dist.parity.report import print_report
    from qwen_dist.parity.run import ParityOptions, run_parity
    from qwen_dist.runtime.stderr_filter import dropped_lines

    parity_options = ParityOptions(
        model=str(local_directory(config.model.path)),
        dtype=config.model.dtype,
        prompts=tuple(options.prompt or ()),
        tokens=options.tokens,
        mesh=config.mesh,
        ignored_keys=tuple(config.model.ignored_keys),
    )
    with dropped_lines(r"Involuntary full rematerialization|past_key_values.*deprecated"), warnings.catch_warnings():
        # transformers says it once as a log line and once as a warning; its first releases have no other name.
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        report = run_parity(parity_options, progress=lambda stage: print(stage, file=sys.stderr))
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        print_report(report, _console())
    if options.report:
        write_html(report, options.report)
    return 0 if report.ok else 1


# --- preflight ---


def _preflight(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(_ModelConfig, None, overrides, {"model.path": ""} | _config_values(options))
    with _joined(options, config) as processes:
        start_jax(options.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        import jax

        from qwen_dist.mesh import MeshConfig, make_mesh, sum_over_devices
        from qwen_dist.sharding import INFERENCE, ShardingContext

        devices = jax.devices()
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(config.mesh or "fsdp=-1")), INFERENCE)
        total = sum_over_devices(sharding_ctx.mesh)
        if total != sharding_ctx.mesh.size:
            raise UserError(
                f"preflight: the sum of a 1 from each of {sharding_ctx.mesh.size} devices is {total}: the network or a "
                "device is faulty"
            )
        report = {
            "processes": list(processes.names),
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "mesh": dict(sharding_ctx.mesh.shape),
        }
        if options.json:
            print(json.dumps(report))
        else:
            for process, who in enumerate(processes.names):
                own = sum(device.process_index == process for device in devices)
                print(f"{who}: {own} {devices[0].device_kind} {'device' if own == 1 else 'devices'}")
            print(sharding_ctx.describe())
            one_process, one_device = processes.count == 1, len(devices) == 1
            print(
                f"{'the process' if one_process else f'all {processes.count} processes'} and "
                f"{'its device' if one_device else f'{len(devices)} devices'} respond"
            )
    return 0


@dataclasses.dataclass(frozen=True)
class _PlanConfig(_ModelConfig):
    """The configuration of `plan`."""

    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(_PlanConfig, None, overrides, _config_values(options))
    from qwen_dist.checkpoint.hub import local_directory
    from qwen_dist.hf_config import read_model_config
    from qwen_dist.planning.chips import Topology

    topology = Topology.parse(options.topology)
    check_paths(_paths_read(config.model), [Written("--chart", options.chart or "", is_page=True)])
    start_jax(topology.num_devices if topology.is_cpu else 1, config.model.dtype, use_compilation_cache=topology.is_cpu)
    find_devices()
    from qwen_dist.planning.plan import compile_plan, make_capacity_plan, parse_layers
    from qwen_dist.planning.report import print_plan, to_json, write_chart
    from qwen_dist.planning.workload import Workload

    directory = local_directory(config.model.path, files=("config.json",))
    model = read_model_config(directory, config.model.ignored_keys)
    lora = config.lora if options.workload == "finetune" and options.method == "lora" else None
    workload = Workload(options.workload, options.batch_size, options.context, config.model.dtype, options.remat, lora)
    plan = make_capacity_plan(config.model.path, model, topology, workload, config.mesh or None)
    if options.compile is not None:
        plan = compile_plan(plan, model, parse_layers(options.compile, model.layers))
    if options.json:
        print(to_json(plan))
    else:
        print_plan(plan, _console())
    if options.chart:
        write_chart(plan, options.chart)
    return 0 if plan.chosen.fits else 1


# --- messages and progress ---


def _announcer(processes: Processes, *, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints to stderr, if it is a terminal or the log of a run with several processes."""
    is_read = processes.count > 1 or sys.stderr.isatty()
    return lambda text: print(text, file=sys.stderr) if is_read and not quiet else None


def _loading(description: str = "loading", *, quiet: bool) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """Return a progress bar in bytes on stderr, if that is a terminal."""
    from qwen_dist.checkpoint.progress import progress_bar

    return progress_bar(description, _console(stderr=True, quiet=quiet or not sys.stderr.isatty()))


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    # A file or a pipe has no width, and rich would cut the tables to 80 columns.
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, quiet=quiet, highlight=False, width=None if has_width else _TABLE_WIDTH)


if __name__ == "__main__":
    sys.exit(main())
