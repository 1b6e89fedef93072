"""A whole training run: from a configuration to a trained model or adapter, cut off and gone on with at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.adapter import Adapter, merge_adapter, read_adapter, write_adapter
from qwen_dist.checkpoint.hub import local_directory
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.checkpoint.save import EXTRA_FILE_NAMES, save
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.config import FinetuneConfig, LoraOptions
from qwen_dist.errors import UsageError, UserError
from qwen_dist.mesh import MeshConfig, make_mesh, training_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import TRAIN, ShardingContext
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.batches import Batch, BatchIterator, evaluation_batches, rows_per_epoch, training_batches
from qwen_dist.train.checkpoints import Checkpoints
from qwen_dist.train.examples import Examples, make_examples
from qwen_dist.train.journal import Journal
from qwen_dist.train.lora import adapter_of, attach, new_adapter, with_adapter
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.records import expand, read
from qwen_dist.train.step import State, Trainer
from qwen_dist.train.utilization import StepFlops, flops_per_second

# What may be different when a run goes on: where and how it computes and for how long, but not what.
_MAY_CHANGE = frozenset(
    (
        "mesh output steps epochs remat num_microbatches save_every max_to_keep keep_best eval_every tensorboard overwrite"
    ).split()
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run needs before there are weights: cheap to make, so that faults in the data show at once."""

    config: FinetuneConfig
    directory: pathlib.Path
    tokenizer: Tokenizer
    model: ModelConfig
    training: Examples
    evaluation: Examples | None
    num_steps: int


@dataclasses.dataclass
class Progressing:
    """How a run stands, after each step. `mfu`: see `train.utilization`; None where the devices' peak is not known."""

    step: int
    num_steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    num_tokens: int
    mfu: float | None
    eval_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run has come to. `is_stopped`: by SIGTERM; the same command goes on. `result`: the directory of the result."""

    steps: int
    loss: float | None
    eval_loss: float | None
    is_stopped: bool
    result: str


Watcher = Callable[[Progressing], None]


def prepare(config: FinetuneConfig) -> Prepared:
    """Read tokenizer, configuration and data. Raises UserError."""
    directory = local_directory(config.model.path, weights=config.model.load_format != "dummy")
    model = ModelConfig.from_directory(directory, config.model.ignored_keys)
    if config.data.max_length > model.max_position_embeddings:
        raise UsageError(
            f"data.max_length is {config.data.max_length}, and the model's context {model.max_position_embeddings}"
        )
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer knows {tokenizer.vocab_size} ids and the model only {model.vocab_size}")

    def examples(patterns: tuple[str, ...]) -> Examples:
        records = read(expand(patterns), raw=config.data.raw)
        return make_examples(records, tokenizer, max_length=config.data.max_length, bad_records=config.data.bad_records)

    training = examples(config.data.files)
    evaluation = examples(config.data.eval_files) if config.data.eval_files else None
    num_steps = config.steps or math.ceil(config.epochs * rows_per_epoch(training, config.data) / config.batch_size)
    return Prepared(config, directory, tokenizer, model, training, evaluation, num_steps)


def finetune(
    prepared: Prepared,
    *,
    watch: Watcher = lambda progress: None,
    announce: Callable[[str], None] = lambda text: None,
    loading: ProgressCallback | None = None,
) -> Summary:
    """Train, going on from the newest checkpoint in the output directory if there is one.

    Args:
      prepared: by `prepare`, the same on every process.
      watch: told of every step.
      announce: told what is going on, in a sentence.
      loading: see `checkpoint.load.load`.

    Raises:
      UserError: the output belongs to another run, the model cannot be loaded, or the loss is not a number.
    """
    config = prepared.config
    output = pathlib.Path(config.output)
    with sync_processes("preparing the output"):
        if jax.process_index() == 0:
            _prepare_output(output, overwrite=config.overwrite)
    with contextlib.closing(
        Checkpoints(output / "checkpoints", keep=config.max_to_keep, keep_best=config.keep_best)
    ) as checkpoints:
        found = checkpoints.latest
        position = checkpoints.position() if found is not None else None
        if position is not None:
            _check_same_run(position["run"], identity(prepared))
        setup = set_up(prepared, loading)
        state = setup.trainer.start() if position is None else checkpoints.restore(setup.trainer.abstract_state())
        batches = training_batches(prepared.training, config.data, config.batch_size)
        if position is not None:
            announce(f"going on after step {found} of {prepared.num_steps}")
            batches.set_state(position["data"])
        journal = Journal(output, done=found or 0, tensorboard=config.tensorboard, is_first=jax.process_index() == 0)
        with contextlib.closing(journal), _told_to_stop() as is_told:
            run = _Run(prepared, setup, checkpoints, journal, watch, is_told)
            state, step = run.train(state, batches, found or 0)
        if step < prepared.num_steps:
            return Summary(step, run.loss, run.eval_loss, True, "")
        result = _write_result(prepared, setup, state, announce)
    return Summary(step, run.loss, run.eval_loss, False, str(result))


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model with what is trained in it, ready to run; `lora` are the options of the adapter that there is."""

    model: LoadedModel
    trained: list[str]
    trainer: Trainer
    lora: LoraOptions


def set_up(prepared: Prepared, loading: ProgressCallback | None = None) -> Setup:
    """Load the model and make the programs that train it. Raises UserError."""
    config = prepared.config
    adapter = read_adapter(config.model.adapter) if config.model.adapter else None
    model = load_model(
        prepared.directory,
        _sharding_ctx(prepared),
        dtype=_base_dtype(config),
        weights=config.model.path if "://" in config.model.path else None,
        load_format=config.model.load_format,
        ignored_config_keys=config.model.ignored_keys,
        host_memory_budget=config.model.host_memory_bytes,
        progress=loading,
    )
    if config.method == "full":
        if adapter is not None:
            model = dataclasses.replace(model, parameters=merge_adapter(model.parameters, adapter, model.sharding_ctx))
        return _with_trainer(prepared, model, list(model.parameters), config.lora)
    if adapter is not None:
        lora = dataclasses.replace(config.lora, rank=adapter.rank, alpha=adapter.alpha, use_rslora=adapter.rslora)
        return _with_trainer(prepared, *with_adapter(model, adapter, dtype=_trained_dtype(config)), lora)
    return _with_trainer(prepared, *new_adapter(model, config.lora, dtype=_trained_dtype(config)), config.lora)


def set_up_abstract(prepared: Prepared) -> Setup:
    """The same without any weights, to look at; an adapter to go on with counts as a new one. Raises UserError."""
    config = prepared.config
    module = Transformer(prepared.model, dtype=_base_dtype(config))
    names = None if config.method == "full" else attach(module, config.lora, dtype=_trained_dtype(config))
    leaves: Any = abstract_parameters(module, _sharding_ctx(prepared))
    model = LoadedModel(prepared.model, module, leaves, _sharding_ctx(prepared))
    return _with_trainer(prepared, model, list(leaves) if names is None else names, config.lora)


def _sharding_ctx(prepared: Prepared) -> ShardingContext:
    text = prepared.config.mesh
    mesh = MeshConfig.parse(text) if text else training_mesh(prepared.model, jax.devices())
    return ShardingContext(make_mesh(mesh), TRAIN)


def _trained_dtype(config: FinetuneConfig) -> jax.numpy.dtype:
    dtype = jax.numpy.dtype(config.model.dtype)
    return accum_dtype(dtype) if config.master_weights else dtype


def _base_dtype(config: FinetuneConfig) -> jax.numpy.dtype:
    """What an adapter is added to is only read: it needs no more than the computation's type."""
    return _trained_dtype(config) if config.method == "full" else jax.numpy.dtype(config.model.dtype)


def _with_trainer(prepared: Prepared, model: LoadedModel, trained: list[str], lora: LoraOptions) -> Setup:
    config = prepared.config
    schedule = make_schedule(config.optimizer, prepared.num_steps)
    shapes = {name: model.parameters[name].shape for name in trained}
    trainer = Trainer(
        model,
        trained,
        make_optimizer(config.optimizer, schedule, shapes, disk_shapes(model.module)),
        schedule,
        dtype=config.model.dtype,
        remat=config.remat,
        clip_norm=config.optimizer.clip_norm,
    )
    return Setup(model, trained, trainer, lora)


class _Run:
    """The steps of a run, and what happens between them."""

    def __init__(
        self,
        prepared: Prepared,
        setup: Setup,
        checkpoints: Checkpoints,
        journal: Journal,
        watch: Watcher,
        is_told: threading.Event,
    ):
        self._prepared, self._config, self._trainer = prepared, prepared.config, setup.trainer
        self._checkpoints, self._journal, self._watch, self._is_told = checkpoints, journal, watch, is_told
        self._identity = identity(prepared)
        self._flops = StepFlops(setup.model, setup.trained)
        self._flops_per_second = flops_per_second(setup.model.sharding_ctx.mesh.devices.flatten(), setup.trainer.dtype)
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def train(self, state: State, batches: BatchIterator, step: int) -> tuple[State, int]:
        """Steps until there have been enough, or the process is told to stop; saved then. Returns how many were done."""
        num_steps, config = self._prepared.num_steps, self._config
        batch, stops = next(batches), False
        while step < num_steps and not stops:
            start, position = time.monotonic(), batches.get_state()
            state, metrics = self._trainer.step(state, batch.parts(config.num_microbatches))
            following = next(batches)  # made while the devices compute
            loss, norm, rate = (float(value) for value in jax.device_get(metrics))
            step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(self._describe_nan(step, batch, loss, norm))
            self.loss = loss
            seconds = time.monotonic() - start
            num_tokens, mfu = int((batch.positions >= 0).sum()), self._utilization(batch, seconds)
            progress = Progressing(step, num_steps, loss, norm, rate, seconds, num_tokens, mfu)
            stops = _any_process(self._is_told.is_set())
            is_last = step == num_steps
            if self._prepared.evaluation is not None and (is_last or _is_due(step, config.eval_every)):
                progress.eval_loss = self.eval_loss = self._evaluate(state)
            self._record(progress)
            if is_last or stops or _is_due(step, config.save_every):
                self._checkpoints.save(step, state, {"data": position, "run": self._identity}, self.eval_loss)
            batch = following
        return state, step

    def _utilization(self, batch: Batch, seconds: float) -> float | None:
        peak = self._flops_per_second
        return None if peak is None else self._flops(batch.positions) / (seconds * peak)

    def _evaluate(self, state: State) -> float:
        """The mean loss of all tokens to be learnt in the evaluation data."""
        assert self._prepared.evaluation is not None
        total, count = 0.0, 0
        size = self._config.batch_size // self._config.num_microbatches
        for batch in evaluation_batches(self._prepared.evaluation, self._config.data, size):
            loss, learnt = jax.device_get(self._trainer.evaluate(state, batch))
            total, count = total + float(loss), count + int(learnt)
        return total / max(count, 1)

    def _record(self, progress: Progressing) -> None:
        names = ("loss", "gradient_norm", "learning_rate", "seconds", "num_tokens", "mfu", "eval_loss")
        numbers = {name: value for name in names if (value := getattr(progress, name)) is not None}
        self._journal.add(progress.step, numbers)
        self._watch(progress)

    def _describe_nan(self, step: int, batch: Batch, loss: float, norm: float) -> str:
        path = pathlib.Path(self._config.output) / f"batch-{step}.npz"
        if jax.process_index() == 0:
            np.savez(path, **{name: value for name, value in batch._asdict().items() if value is not None})
        saved = self._checkpoints.latest
        return (
            f"step {step}: the loss is {loss} and the norm of the gradient {norm}, so the run has stopped. Its batch is in "
            f"{path}; {f'the checkpoint after step {saved}' if saved else 'no checkpoint'} is from before. "
            "Try a lower optimizer.learning_rate, or float32."
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _any_process(flag: bool) -> bool:
    """Whether the flag is set on any process: all must stop after the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while the block runs, in the main thread; elsewhere nothing does."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def identity(prepared: Prepared) -> dict[str, Any]:
    """What a run is, in JSON values: a run of another identity cannot go on from its checkpoints."""
    fields = dataclasses.asdict(prepared.config)
    kept = {name: value for name, value in fields.items() if name not in _MAY_CHANGE}
    kept["data"] = kept["data"] | {"tokens": _digest(prepared.training)}
    del kept["data"]["eval_files"], kept["data"]["files"]
    return json.loads(json.dumps(kept))


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(example.tokens.tobytes() + example.is_learnt.tobytes())
    return digest.hexdigest()[:16]


def _check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = _flat(found), _flat(wanted)
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        lines = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different]
        raise UserError(
            "the output directory has checkpoints of another run:\n  - "
            + "\n  - ".join(lines)
            + "\nName another output, or begin anew with --overwrite."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _prepare_output(output: pathlib.Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; name a directory")
    is_run = (output / "checkpoints").is_dir()
    if output.exists() and any(output.iterdir()) and not is_run:
        raise UsageError(f"output {output} is not empty and not of a training run; name another directory")
    if overwrite and is_run:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def _write_result(prepared: Prepared, setup: Setup, state: State, announce: Callable[[str], None]) -> pathlib.Path:
    """The adapter in PEFT's layout, or the model as a Hugging Face directory, in the type of the computation."""
    config, output = prepared.config, pathlib.Path(prepared.config.output)
    if config.method == "lora":
        announce(f"writing the adapter: {output / 'adapter'}")
        adapter: Adapter = adapter_of(state.parameters, setup.lora, setup.model.sharding_ctx)
        write_adapter(output / "adapter", adapter, base=config.model.path)
        return output / "adapter"
    announce(f"writing the model: {output / 'model'}")
    files = {name: prepared.directory / name for name in EXTRA_FILE_NAMES}
    save(
        setup.trainer.parameters(state),
        output / "model",
        config=json.loads((prepared.directory / "config.json").read_text(encoding="utf-8")),
        disk_shapes=disk_shapes(setup.model.module),
        extra_files={name: path.read_bytes() for name, path in files.items() if path.is_file()},
        dtype=jax.numpy.dtype(config.model.dtype),
        overwrite=True,
    )
    return output / "model"
