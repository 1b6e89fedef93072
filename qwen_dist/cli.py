"""One door to everything: `qwen-dist VERB …`. Thin: flags in, a configuration out, and what the verb says printed.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 told to stop and saved (finetune), 130 interrupted.
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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import qwen_dist
from qwen_dist.config import (
    BatchConfig,
    FinetuneConfig,
    GenerateConfig,
    LoraOptions,
    ModelOptions,
    load_config,
    parse_bytes,
)
from qwen_dist.errors import UsageError, UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qwen_dist.batch.run import Summary
    from qwen_dist.batch.series import Series
    from qwen_dist.engine.engine import Engine, EngineStats
    from qwen_dist.engine.request import RequestOutput, SamplingParams
    from qwen_dist.hosts.join import Hosts
    from qwen_dist.tokenizer import Tokenizer

_Flag = tuple[str, str, type, str, str]
# Flags that are short for a configuration key: (flag, key, type, metavar, help).
_MODEL_FLAGS: tuple[_Flag, ...] = (
    ("--model", "model.path", str, "DIR_OR_HUB_ID", "checkpoint in the Hugging Face format"),
    ("--dtype", "model.dtype", str, "DTYPE", "bfloat16, float32 or float64 (bfloat16; parity: float32; export: as stored)"),
    ("--mesh", "mesh", str, "AXES", "devices by axis, such as fsdp=2,tensor=4"),
    ("--host-memory-budget", "model.host_memory_budget", str, "SIZE", "for the loader's buffers, such as 256MB"),
)
_ADAPTER_FLAG: tuple[_Flag, ...] = (("--adapter", "model.adapter", str, "DIR", "a low-rank adapter in PEFT's layout"),)
_ANSWER_FLAGS: tuple[_Flag, ...] = (
    ("--load-format", "model.load_format", str, "FORMAT", "safetensors (default) or dummy: random weights"),
    ("--max-new-tokens", "sampling.max_new_tokens", int, "N", "end an answer after so many tokens (512)"),
    ("--temperature", "sampling.temperature", float, "T", "0 always takes the most probable token"),
    ("--top-k", "sampling.top_k", int, "K", "draw from the K most probable tokens; 0 from all"),
    ("--top-p", "sampling.top_p", float, "P", "draw from the fewest tokens with probability P"),
    ("--min-p", "sampling.min_p", float, "P", "drop tokens below P times the best one's probability"),
    ("--repetition-penalty", "sampling.repetition_penalty", float, "R", "above 1 avoids tokens seen before"),
    ("--seed", "sampling.seed", int, "N", "what is drawn; the same again with the same seed"),
    ("--stop", "sampling.stop", str, "TEXT", "end an answer before this text; may be repeated"),
    ("--logprobs", "sampling.logprobs", int, "N", "log-probabilities, with the N best alternatives"),
)

_TRAINING_FLAGS: tuple[_Flag, ...] = (
    ("--load-format", "model.load_format", str, "FORMAT", "safetensors (default) or dummy: from random weights"),
    ("--data", "data.files", str, "FILE", "JSON lines, parquet or text; may be repeated, and hold *"),
    ("--eval-data", "data.eval_files", str, "FILE", "the same, to judge by and not to learn"),
    ("--output", "output", str, "DIR", "for checkpoints, numbers and the result; the same again goes on with the run"),
    ("--method", "method", str, "METHOD", "lora (default) or full"),
    ("--steps", "steps", int, "N", "instead of config.epochs (1)"),
    ("--batch-size", "batch_size", int, "N", "rows a step, on all devices together (8)"),
    ("--learning-rate", "optimizer.learning_rate", float, "R", "the highest of the run (1e-5)"),
)

_TOLD_TO_STOP = 75  # EX_TEMPFAIL: the same command again goes on
_INTERRUPTED = 130

# A small model that comes with the package answers where no other is named.
_DEMONSTRATION = {"model.path": str(pathlib.Path(qwen_dist.__file__).parent / "demo" / "model")}

# How long processes wait for each other before the preflight says who is missing.
_START_TIMEOUT_S = 60.0
_COMPILED = "~/.cache/qwen_dist/compiled"
_TABLE_WIDTH = 160

_GENERATE_EXAMPLE = """\
examples:
  qwen-dist generate --prompt "Why is the sky blue?"      by the small demonstration model
  qwen-dist generate --model ~/qwen3-0.6b                 a chat; Ctrl-D ends it
  echo "Say hi" | qwen-dist generate --model Qwen/Qwen3-0.6B --temperature 0 --json
  qwen-dist generate --model ~/qwen3-8b --mesh tensor=4 --config.sampling.top_k=20
sampling flags that are not given come from the checkpoint's generation_config.json"""

_BATCH_EXAMPLE = """\
example:
  qwen-dist batch --config configs/batch.py --model ~/qwen3-0.6b --input in.jsonl --output out.jsonl"""


_FINETUNE_EXAMPLE = """\
examples:
  qwen-dist finetune --config configs/finetune_lora.py --model ~/qwen3-0.6b --data chats.jsonl --output run --steps 100
  qwen-dist finetune --config configs/finetune_full.py --model ~/qwen3-0.6b --data chats.jsonl --output run --dry-run
  qwen-dist finetune --model ~/qwen3-0.6b --data chats.jsonl --output run --show-data 2
  qwen-dist generate --model ~/qwen3-0.6b --adapter run/adapter
a run that was cut off goes on from its newest checkpoint; SIGTERM saves first (exit code 75)"""

_PREFLIGHT_EXAMPLE = """\
examples, the same command on every host:
  qwen-dist preflight --model ~/qwen3-8b --mesh fsdp=2,tensor=8          on a TPU pod, GKE or Slurm
  qwen-dist preflight --coordinator host-a:8482 --num-processes 2 --process-id 0
the same checks come before every run of several processes"""

_INSPECT_EXAMPLE = """\
examples:
  qwen-dist inspect ~/qwen3-0.6b
  qwen-dist inspect Qwen/Qwen3-8B --mesh fsdp=4,tensor=2 --json
reads headers and configuration only; exit code 1 when there are problems"""

_EXPORT_EXAMPLE = """\
example:
  qwen-dist export --model ~/qwen3-8b --output ~/qwen3-8b-float32 --dtype float32 --max-shard-size 2GB"""

_PARITY_EXAMPLE = """\
examples:
  qwen-dist parity --model ~/qwen3-0.6b --dtype float32
  qwen-dist parity --model ~/qwen3-0.6b --dtype bfloat16 --prompt "Why is the sky blue?" --report parity.html
exit code 1 names the first component beyond its bound; needs the extra: pip install 'qwen-dist[parity]'"""


_PLAN_EXAMPLE = """\
examples:
  qwen-dist plan --model ~/qwen3-32b --topology v5e:8x8 --verb batch --batch 64 --context 4096
  qwen-dist plan --model config.json --topology v6e:4x4 --mesh fsdp=16 --verb finetune --method full --compile 3,5
  qwen-dist plan --model ~/qwen3-0.6b --topology cpu:8 --mesh data=2,tensor=4 --compile
only config.json is read; --compile for a TPU needs libtpu (pip install libtpu), and no TPU; exit code 1: does not fit"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(given)
    overrides = [argument for argument in unknown if argument.startswith("--config.")]
    if wrong := [argument for argument in unknown if argument not in overrides]:
        options.verb_parser.error(f"unknown argument {' '.join(wrong)}; `qwen-dist {options.verb} --help` lists all")
    try:
        return options.run(options, overrides)
    except UserError as error:
        if options.debug:
            raise
        print(f"qwen-dist {options.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-dist", description="Run and fine-tune Qwen text models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qwen-dist {qwen_dist.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    generate = _add_verb(verbs, "generate", _generate, "answer a prompt, or chat", _GENERATE_EXAMPLE)
    generate.add_argument("--prompt", metavar="TEXT", help="without it: standard input, or a chat in a terminal")
    generate.add_argument("--system", metavar="TEXT", help="the system message")
    generate.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    _add_run_flags(generate)
    _add_host_flags(generate)

    batch = _add_verb(verbs, "batch", _batch, "answer every line of a file", _BATCH_EXAMPLE)
    batch.add_argument(
        "--input", metavar="FILE", help='lines {"id","prompt"}, {"id","messages"} or of OpenAI; .gz, .zst, .parquet'
    )
    batch.add_argument("--output", metavar="FILE", help="of the same kinds; a run that is cut off goes on")
    batch.add_argument("--max-batch-size", type=int, metavar="N", help="answer so many at a time (96)")
    batch.add_argument(
        "--groups", type=int, metavar="N", help="divide the processes into N groups, each with all weights (1)"
    )
    batch.add_argument("--raw", action="store_true", default=None, help="prompts without the chat template")
    batch.add_argument("--overwrite", action="store_true", default=None, help="begin anew where results exist")
    batch.add_argument("--retry-errors", action="store_true", default=None, help="answer again what ended in an error")
    batch.add_argument("--keep-order", action="store_true", default=None, help="results in the order of the input")
    batch.add_argument("--chart", metavar="FILE", help="an HTML page of speed, requests and cache use over time")
    batch.add_argument("--metrics-port", type=int, metavar="PORT", help="serve numbers for Prometheus while it runs")
    batch.add_argument("--profile", metavar="DIR", help="a trace of the first seconds, for TensorBoard or XProf")
    _add_run_flags(batch)
    _add_host_flags(batch)

    finetune = _add_verb(verbs, "finetune", _finetune, "train a model or an adapter on your data", _FINETUNE_EXAMPLE)
    finetune.add_argument("--show-data", type=int, metavar="N", help="print N examples with what is learnt marked, and end")
    finetune.add_argument("--dry-run", action="store_true", help="say what would be trained, and end")
    finetune.add_argument("--overwrite", action="store_true", default=None, help="begin a run that exists anew")
    _add_flags(finetune, _MODEL_FLAGS + _ADAPTER_FLAG + _TRAINING_FLAGS)
    _add_device_flag(finetune)
    finetune.add_argument("--config", metavar="FILE[:ARG]", help="a configuration; --config.key=value changes a key")
    _add_host_flags(finetune)

    inspect = _add_verb(verbs, "inspect", _inspect, "what a checkpoint holds and what loading it takes", _INSPECT_EXAMPLE)
    inspect.usage = "qwen-dist inspect DIR_OR_HUB_ID [flags]"
    inspect.add_argument("model.path", metavar="DIR_OR_HUB_ID", help="checkpoint in the Hugging Face format")
    _add_flags(inspect, _MODEL_FLAGS[1:])
    _add_device_flag(inspect)

    export = _add_verb(
        verbs, "export", _export, "load a checkpoint and save it again, as transformers does", _EXPORT_EXAMPLE
    )
    export.add_argument("--output", metavar="DIR", required=True, help="the new checkpoint; complete or absent, never half")
    export.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of each weight file (5GB)")
    export.add_argument("--overwrite", action="store_true", help="replace a checkpoint that exists")
    _add_flags(export, _MODEL_FLAGS + _ADAPTER_FLAG)
    _add_device_flag(export)
    _add_host_flags(export)

    preflight = _add_verb(verbs, "preflight", _preflight, "check hosts and devices before a run", _PREFLIGHT_EXAMPLE)
    _add_flags(preflight, _MODEL_FLAGS)
    _add_device_flag(preflight)
    _add_host_flags(preflight)

    parity = _add_verb(verbs, "parity", _parity, "compare with PyTorch, component by component", _PARITY_EXAMPLE)
    parity.add_argument("--prompt", action="append", metavar="TEXT", help="a text to compare on; may be repeated")
    parity.add_argument("--tokens", type=int, metavar="N", help="instead of prompts: N random tokens")
    parity.add_argument("--report", metavar="FILE", help="also write an HTML page")
    _add_flags(parity, _MODEL_FLAGS[:3])
    _add_device_flag(parity)

    plan = _add_verb(verbs, "plan", _plan, "whether a model fits on devices that are not here, and how fast", _PLAN_EXAMPLE)
    plan.usage = "qwen-dist plan --model DIR_OR_CONFIG_JSON --topology KIND:SIZES [flags]"
    plan.add_argument("--topology", metavar="KIND:SIZES", required=True, help="such as v5e:8x8, v5p:4x4x4 or cpu:8")
    plan.add_argument("--verb", dest="planned", choices=("batch", "finetune"), default="batch", help="what to run (batch)")
    plan.add_argument("--batch", type=int, metavar="N", default=32, help="rows at a time, on all devices together (32)")
    plan.add_argument("--context", type=int, metavar="N", default=4096, help="tokens a row, with the answer (4096)")
    plan.add_argument("--method", choices=("lora", "full"), default="lora", help="of finetune (lora)")
    plan.add_argument("--remat", choices=("none", "products", "blocks"), default="blocks", help="of finetune (blocks)")
    plan.add_argument("--compile", nargs="?", const="all", metavar="A,B", help="ask the compiler; A,B: from so many layers")
    plan.add_argument("--chart", metavar="FILE", help="also write an HTML page with the memory of each device")
    _add_flags(plan, _MODEL_FLAGS[:3])
    return parser


def _add_verb(verbs: Any, name: str, run: Callable[..., int], description: str, example: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=description,
        description=description,
        epilog=example,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        usage=f"qwen-dist {name} --model DIR_OR_HUB_ID [flags]",
    )
    verb.set_defaults(run=run, verb_parser=verb)
    return verb


def _add_run_flags(verb: argparse.ArgumentParser) -> None:
    _add_flags(verb, _MODEL_FLAGS + _ADAPTER_FLAG + _ANSWER_FLAGS)
    _add_device_flag(verb)
    verb.add_argument("--config", metavar="FILE[:ARG]", help="a configuration; --config.key=value changes a key")


def _add_device_flag(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--num-cpu-devices", type=int, metavar="N", help="run on N CPU devices of this machine")


def _add_host_flags(verb: argparse.ArgumentParser) -> None:
    """Who this process is among several; on TPU pods, GKE and Slurm the cluster says it."""
    verb.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens (else the cluster says it)")
    verb.add_argument("--num-processes", type=int, metavar="N", help="how many processes run this command")
    verb.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    wait = os.environ.get("QWEN_DIST_START_TIMEOUT", _START_TIMEOUT_S)
    verb.add_argument("--start-timeout", type=float, default=wait, metavar="S", help="wait for them so long (60)")


def _add_flags(verb: argparse.ArgumentParser, flags: Sequence[_Flag]) -> None:
    for flag, key, kind, metavar, help in flags:
        action = "append" if flag in ("--stop", "--data", "--eval-data") else "store"
        verb.add_argument(flag, dest=key, type=kind, metavar=metavar, help=help, action=action)
    verb.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _config_values(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    keys = [key for _, key, *_ in _MODEL_FLAGS + _ADAPTER_FLAG + _ANSWER_FLAGS] + list(more)
    return {key: value for key in keys if (value := getattr(options, key, None)) is not None}


def start_jax(num_cpu_devices: int | None, dtype: str, *, keeps_programs: bool = True) -> None:
    """The only place that changes jax's settings, before any device is used.

    Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/qwen_dist/compiled: the second start of
    the same model on the same machine compiles nothing. Those for devices that are not here cannot be read back: without
    `keeps_programs` none is kept.
    """
    import jax

    if num_cpu_devices is not None:
        if num_cpu_devices < 1:
            raise UsageError(f"--num-cpu-devices {num_cpu_devices}: give at least 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(_COMPILED).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not keeps_programs:
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def _joined(
    options: argparse.Namespace, config: Any, *, groups: int = 1, input: str | None = None, **more: Any
) -> Iterator[Hosts]:
    """The block as one process of several, if it is: after the preflight, and with a standard output only on process 0.

    `config` and `more` must be alike on all processes, and so must the content of the file `input`.
    """
    from qwen_dist.hosts.cluster import detect

    cluster = detect(options.coordinator, options.num_processes, options.process_id, os.environ)
    from qwen_dist.hosts.join import Hosts, join
    from qwen_dist.hosts.preflight import gather

    if cluster is None:
        yield Hosts()
        return
    model: ModelOptions = config.model
    on_host = bool(options.num_cpu_devices) or os.environ.get("JAX_PLATFORMS") == "cpu"
    copies = {"bfloat16": 1, "float32": 2, "float64": 4}[model.dtype] * groups / cluster.num_processes
    facts = gather(
        {"verb": options.verb, **vars(config), **more},
        checkpoint=model.path,
        input=input,
        disk=[os.environ.get("JAX_COMPILATION_CACHE_DIR") or _COMPILED],
        weights_in_memory=copies if on_host and model.load_format != "dummy" else 0.0,
    )
    with _own_stdout(cluster.process_id), join(cluster, facts, options.start_timeout) as hosts:
        yield hosts


@contextlib.contextmanager
def _own_stdout(process_id: int) -> Iterator[None]:
    """What Python prints goes to the standard output, on process 0 alone; what libraries print there, to standard error.

    The library of the collectives between CPU processes writes of its connections to file 1.
    """
    sys.stdout.flush()
    answers = os.dup(1) if process_id == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    with os.fdopen(answers, "w", encoding=sys.stdout.encoding) as out, contextlib.redirect_stdout(out):
        yield


# --- generate ---


def _generate(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(GenerateConfig, options.config, overrides, _config_values(options), _DEMONSTRATION)
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is None and options.json:
        raise UsageError("--json needs --prompt, or the prompt on standard input")
    with _joined(options, config, prompt=prompt, system=options.system, raw=options.raw) as hosts:
        if prompt is None and hosts.count > 1:
            raise UsageError("a chat is for a single process; give --prompt to all of several")
        start_jax(options.num_cpu_devices, config.model.dtype)
        hosts.check_devices()
        from qwen_dist.engine.open import open_engine

        quiet = options.json or not hosts.is_first
        with _loading(quiet=quiet) as progress:
            engine, tokenizer, sampling = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=1,
                progress=progress,
                announce=_announcing(hosts, quiet=quiet),
            )
        if prompt is None:
            return _chat(engine, tokenizer, sampling, options.system)
        if options.raw:
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.apply_chat_template([*_system(options.system), {"role": "user", "content": prompt}])
        _answer(engine, tokenizer, sampling, ids, as_json=options.json)
    return 0


def _chat(engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, system: str | None) -> int:
    with contextlib.suppress(ImportError):  # line editing and history, where Python has them
        import readline  # noqa: F401
    messages = _system(system)
    print("Chat. An empty line or Ctrl-D ends it, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            text = input("\n> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(engine, tokenizer, sampling, tokenizer.apply_chat_template(messages), as_json=False)
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
            messages.pop()
        except UserError as error:
            print(error, file=sys.stderr)
            messages.pop()


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _answer(engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, ids: Sequence[int], *, as_json: bool) -> str:
    """Stream one answer to standard output, or print it as one JSON object; returns its text."""
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
        print(json.dumps(_answer_json(text, updates, tokenizer), ensure_ascii=False))
        return text
    print()
    if sys.stderr.isatty():
        speed = (last.num_generated - 1) / max(end - first, 1e-9)
        print(
            f"[{len(ids)} tokens read, {last.num_generated} written, {first - start:.1f} s to the first, "
            f"then {speed:.1f} a second; ended by {last.finish_reason}]",
            file=sys.stderr,
        )
    return text


def _answer_json(text: str, updates: list[RequestOutput], tokenizer: Tokenizer) -> dict[str, Any]:
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
    names = ("input", "output", "max_batch_size", "groups", "raw", "overwrite", "retry_errors", "keep_order")
    values = _config_values(options, *names, "chart", "metrics_port", "profile")
    config = load_config(BatchConfig, options.config, overrides, values, _DEMONSTRATION)
    with _joined(options, config, groups=config.groups, input=config.input) as hosts:
        start_jax(options.num_cpu_devices, config.model.dtype)
        hosts.check_devices()
        # Several processes would have to stop at the same record.
        with contextlib.nullcontext(lambda: False) if hosts.count > 1 else _stopping() as stopped:
            summary = _run_share(config, hosts, stopped, quiet=options.json or not hosts.is_first)
            _print_summary(summary, config.output, as_json=options.json)
            return _INTERRUPTED if stopped() else 0


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C has been pressed; the second time it ends the program as always."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        print("\nstopping when the answers that have begun are finished; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _run_share(config: BatchConfig, hosts: Hosts, stopped: Callable[[], bool], *, quiet: bool) -> Summary:
    """This process's part of a batch; on process 0 the counts of all."""
    from qwen_dist.batch.manifest import settings_of, write_manifest
    from qwen_dist.batch.run import run_batch
    from qwen_dist.batch.share import open_share
    from qwen_dist.engine.open import open_engine
    from qwen_dist.hosts.join import group_of

    group, settings = group_of(hosts, config.groups), settings_of(config)
    share = open_share(
        config.input,
        config.output,
        hosts,
        group,
        settings=json.dumps(settings),
        overwrite=config.overwrite,
        retry_errors=config.retry_errors,
        keep_order=config.keep_order,
    )
    with share as (records, results), _watching(config, hosts, quiet=quiet) as watch:
        with _loading(quiet=quiet) as progress:
            engine, tokenizer, sampling = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=config.max_batch_size,
                cache_bytes=parse_bytes(config.cache_memory),
                steps_per_dispatch=config.steps_per_dispatch,
                devices=group.devices(),
                progress=progress,
                announce=_announcing(hosts, quiet=quiet),
            )
        with _batch_progress(config.input, results.num_before, quiet=quiet) as show:

            def report(summary: Summary, stats: EngineStats) -> None:
                results.collect()
                show(summary, stats)
                watch(summary, stats)

            summary = run_batch(
                engine, tokenizer, sampling, records, results, raw=config.raw, report=report, stopped=stopped
            )
        summary = results.finish(summary, not stopped())
    if hosts.is_first:
        write_manifest(config, settings, summary, is_complete=not stopped())
    return summary


def _print_summary(summary: Summary, output: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"output": output, **vars(summary)}))
    else:
        speed = summary.num_generated_tokens / max(summary.seconds, 1e-9)
        before = f"{summary.num_before} were there; " if summary.num_before else ""
        print(
            f"{before}{summary.num_answered} answered, {summary.num_errors} with an error; {summary.num_prompt_tokens} "
            f"tokens read and {summary.num_generated_tokens} written in {summary.seconds:.1f} s ({speed:.1f} a second): "
            f"{output}"
        )


@contextlib.contextmanager
def _watching(config: BatchConfig, hosts: Hosts, *, quiet: bool) -> Iterator[Callable[[Summary, EngineStats], None]]:
    """What is asked for beside the answers of this process: metrics, a profile, a chart, and a table at the end."""
    from qwen_dist.batch.metrics import metrics_server
    from qwen_dist.batch.series import Series, check_chart, write_chart
    from qwen_dist.engine.profile import profiling

    series = Series()
    with contextlib.ExitStack() as stack:
        watches: list[Callable[[Summary, EngineStats], None]] = [series.add]
        if hosts.is_first and config.chart:
            check_chart(config.chart)
            stack.callback(write_chart, config.chart, series)
        if hosts.is_first and config.metrics_port is not None:
            watches.append(stack.enter_context(metrics_server(config.metrics_port)))
        if hosts.is_first and config.profile:
            tick = stack.enter_context(profiling(config.profile))
            watches.append(lambda summary, stats: tick())

        def watch(summary: Summary, stats: EngineStats) -> None:
            for one in watches:
                one(summary, stats)

        yield watch
        _console(stderr=True, quiet=quiet).print(_table(series))


def _table(series: Series) -> Table:
    """What a batch did over time, on this process."""
    from rich.table import Table

    last, table = series.samples[-1], Table()
    for column in ("", "in all", "mean", "most"):
        table.add_column(column, justify="right" if column else "left")
    for name, field in (("tokens read", "num_read"), ("tokens written", "num_written")):
        speeds = [speed for _, speed in series.speeds(field)]
        total = getattr(last, field)
        mean = f"{total / max(last.seconds, 1e-9):.1f} a second"
        table.add_row(name, str(total), mean, f"{max(speeds, default=0):.1f} a second")
    for name, field, form in (("requests at a time", "num_running", ".1f"), ("cache held", "cache_use", ".0%")):
        most = max(getattr(sample, field) for sample in series.samples)
        table.add_row(name, "", f"{series.mean(field):{form}}", f"{most:{form}}")
    return table


@contextlib.contextmanager
def _batch_progress(input: str, num_before: int, *, quiet: bool) -> Iterator[Callable[[Summary, EngineStats], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    from qwen_dist.batch.formats import read_lines

    total = 0 if quiet else sum(1 for line in read_lines(input) if line.strip())
    columns = (
        TextColumn("answering"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True, quiet=quiet)) as bar:
        task = bar.add_task("", total=total, completed=num_before, told="")

        def report(summary: Summary, stats: EngineStats) -> None:
            seconds = max(summary.seconds, 1e-9)
            bar.update(
                task,
                completed=num_before + summary.num_answered + summary.num_errors,
                told=f"{summary.num_prompt_tokens / seconds:.0f} tokens/s in, {summary.num_generated_tokens / seconds:.0f} "
                f"out; {stats.num_running} running, {stats.num_waiting} waiting, "
                f"cache {stats.held_positions / max(stats.cache_positions, 1):.0%}",
            )

        yield report


# --- finetune ---


def _finetune(options: argparse.Namespace, overrides: list[str]) -> int:
    values = _config_values(options, *(key for _, key, *_ in _TRAINING_FLAGS), "overwrite")
    config = load_config(FinetuneConfig, options.config, overrides, values)
    with _joined(options, config) as hosts:
        from qwen_dist.train.heap import keep_freed_memory

        start_jax(options.num_cpu_devices, config.model.dtype)
        keep_freed_memory()
        hosts.check_devices()
        from qwen_dist.train.console import describe_data, describe_training, show_data, watching
        from qwen_dist.train.run import finetune, prepare, set_up_abstract

        prepared = prepare(config)
        if options.show_data is not None:
            show_data(prepared, options.show_data, _console())
            return 0
        console = _console(stderr=True, quiet=options.json or not hosts.is_first)
        if options.dry_run:
            print(describe_data(prepared))
            print(describe_training(set_up_abstract(prepared), prepared))
            return 0
        console.print(describe_data(prepared), highlight=False, soft_wrap=True)
        with watching(console) as watch:
            summary = finetune(prepared, watch=watch, announce=lambda text: console.print(text, highlight=False))
        if options.json:
            print(json.dumps(vars(summary)))
        elif summary.is_stopped:
            print(f"stopped after step {summary.steps}, which is saved; the same command goes on")
        else:
            loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
            print(f"{summary.steps} steps{loss}: {summary.result}")
    return _TOLD_TO_STOP if summary.is_stopped else 0


# --- inspect, export, parity, plan ---


@dataclasses.dataclass(frozen=True)
class _ModelConfig:
    """What the verbs that only handle a checkpoint are told."""

    model: ModelOptions
    mesh: str = ""


def _inspect(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(_ModelConfig, None, overrides, _config_values(options))
    from qwen_dist.mesh import MeshConfig, make_mesh

    mesh = MeshConfig.parse(config.mesh)
    # Nothing is computed, so devices can be had for the asking.
    start_jax(options.num_cpu_devices or mesh.num_devices, config.model.dtype)
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


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    values = _config_values(options)
    config = load_config(_ModelConfig, None, overrides, values)
    with _joined(options, config, output=options.output) as hosts:
        start_jax(options.num_cpu_devices, config.model.dtype)
        hosts.check_devices()
        from qwen_dist.checkpoint.model import export_model
        from qwen_dist.mesh import MeshConfig, make_mesh
        from qwen_dist.sharding import INFERENCE, ShardingContext

        with _loading("exporting", quiet=options.json or not hosts.is_first) as progress:
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
    start_jax(options.num_cpu_devices, config.model.dtype)
    from qwen_dist.parity.page import write_html
    from qwen_dist.parity.report import print_report
    from qwen_dist.parity.run import ParityOptions, run_parity

    asked = ParityOptions(
        model=config.model.path,
        dtype=config.model.dtype,
        prompts=tuple(options.prompt or ()),
        tokens=options.tokens,
        mesh=config.mesh,
    )
    report = run_parity(asked, progress=lambda stage: print(stage, file=sys.stderr))
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
    with _joined(options, config) as hosts:
        start_jax(options.num_cpu_devices, config.model.dtype)
        hosts.check_devices()
        import jax

        from qwen_dist.mesh import MeshConfig, add_over_all, make_mesh
        from qwen_dist.sharding import INFERENCE, ShardingContext

        devices = jax.devices()
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(config.mesh or "fsdp=-1")), INFERENCE)
        total = add_over_all(sharding_ctx.mesh)
        if total != sharding_ctx.mesh.size:
            raise UserError(
                f"preflight: the sum of a 1 from each of {sharding_ctx.mesh.size} devices is {total}: the network or a "
                "device is faulty"
            )
        report = {
            "processes": list(hosts.names),
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "mesh": dict(sharding_ctx.mesh.shape),
        }
        if options.json:
            print(json.dumps(report))
        else:
            for process, who in enumerate(hosts.names):
                print(
                    f"{who}: {sum(device.process_index == process for device in devices)} {devices[0].device_kind} devices"
                )
            print(sharding_ctx.describe())
            print(f"all {hosts.count} processes and {len(devices)} devices answer")
    return 0


@dataclasses.dataclass(frozen=True)
class _PlanConfig(_ModelConfig):
    """What `plan` is told besides."""

    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(_PlanConfig, None, overrides, _config_values(options))
    from qwen_dist.models.config import ModelConfig
    from qwen_dist.planning.chips import Topology

    topology = Topology.parse(options.topology)
    start_jax(topology.num_devices if topology.is_cpu else 1, config.model.dtype, keeps_programs=topology.is_cpu)
    from qwen_dist.planning.plan import compiled_layers, make_plan, with_compiled
    from qwen_dist.planning.report import print_plan, to_json, write_chart
    from qwen_dist.planning.workload import Workload

    model = ModelConfig.from_directory(config.model.path, config.model.ignored_keys)
    lora = config.lora if options.planned == "finetune" and options.method == "lora" else None
    workload = Workload(options.planned, options.batch, options.context, config.model.dtype, options.remat, lora)
    plan = make_plan(config.model.path, model, topology, workload, config.mesh or None)
    if options.compile is not None:
        plan = with_compiled(plan, model, compiled_layers(options.compile, len(model.layers)))
    if options.json:
        print(to_json(plan))
    else:
        print_plan(plan, _console())
    if options.chart:
        write_chart(plan, options.chart)
    return 0 if plan.chosen.fits else 1


# --- what people see ---


def _announcing(hosts: Hosts, *, quiet: bool) -> Callable[[str], None]:
    """A function that prints to standard error, where somebody watches or logs of several processes are kept."""
    is_read = hosts.count > 1 or sys.stderr.isatty()
    return lambda text: print(text, file=sys.stderr) if is_read and not quiet else None


def _loading(description: str = "loading", *, quiet: bool) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar in bytes on standard error, where someone watches: in a log it would only be a stray line."""
    from qwen_dist.checkpoint.progress import progress_bar

    return progress_bar(description, _console(stderr=True, quiet=quiet or not sys.stderr.isatty()))


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    # A file or a pipe has no width of its own, and rich would cut the tables to 80 columns.
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, quiet=quiet, highlight=False, width=None if has_width else _TABLE_WIDTH)


if __name__ == "__main__":
    sys.exit(main())
