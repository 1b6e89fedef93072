"""A whole training run, from a configuration to a trained model or adapter. It can be resumed after any interruption."""

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
from typing import Any, Literal

import jax
import numpy as np

from qwen_dist.checkpoint.adapter import Adapter, write_adapter
from qwen_dist.checkpoint.adapter_layers import with_adapter
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.checkpoint.model import LoadedModel, load_model, save_model
from qwen_dist.checkpoint.quantized import Quantization
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.config import DataOptions, FinetuneConfig, LoraOptions, parse_bytes
from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.hf_config import read_model_config
from qwen_dist.json_reader import flatten
from qwen_dist.mesh import MeshConfig, make_mesh, training_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.outputs import Marker, Written, check_paths, run_lock
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.sharding import TRAIN, ShardingContext
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.tokenizer_files import GENERATION_CONFIG
from qwen_dist.train.batches import BatchIterator, TrainBatch, evaluation_batches, rows_per_epoch, training_batches
from qwen_dist.train.checkpoints import Checkpoints
from qwen_dist.train.examples import Examples, make_examples
from qwen_dist.train.lora import attach_lora, extract_adapter, new_adapter
from qwen_dist.train.metrics import MetricsLog
from qwen_dist.train.optim import make_optimizer, make_schedule, num_warmup_steps
from qwen_dist.train.records import find_data_files, read_train_records
from qwen_dist.train.step import Trainer, TrainState
from qwen_dist.train.utilization import StepFlops, peak_flops_per_second

# Fields that may change when a run is resumed: where, how and how long it computes, but not what.
_RESUMABLE_CHANGES = frozenset(
    (
        "mesh output steps epochs remat num_microbatches save_every max_to_keep keep_best eval_every tensorboard overwrite"
    ).split()
)


RUN_MARKER = Marker("qwen_dist_run.json", "training run", 1)
# What a run writes into its directory, and --overwrite removes.
_RUN_DIRECTORIES = ("checkpoints", "damaged-checkpoint-*", "tensorboard", "adapter", "model")
_RUN_FILES = ("metrics.jsonl", "metrics.jsonl.partial", "loss.html", "batch-*.npz")
# A run of fewer steps gets a note.
MIN_STEPS = 10


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What a run needs besides the weights. It is cheap to make, so errors in the data show before the model is loaded.

    Attributes:
      config: with the values that follow from method and model.
      notes: what a user may not expect of the run.
    """

    config: FinetuneConfig
    files: ModelFiles
    tokenizer: Tokenizer
    model: ModelConfig
    training: Examples
    evaluation: Examples | None
    num_steps: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class StepMetrics:
    """The metrics of one step, for the callback. `mfu` (see `train.utilization`) is None if the peak is not known."""

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
class TrainSummary:
    """The result of a run.

    Attributes:
      steps: the number of steps done.
      loss: of the last step; None when no step was done.
      eval_loss: of the last evaluation; None when there was none.
      is_stopped: stopped by SIGTERM; the same command resumes it.
      result: the directory of the model or adapter.
    """

    steps: int
    loss: float | None
    eval_loss: float | None
    is_stopped: bool
    result: str


StepCallback = Callable[[StepMetrics], None]


def prepare(config: FinetuneConfig) -> RunInputs:
    """Read tokenizer, model configuration and data.

    Raises:
      UserError: the model or the data cannot be used, or they do not fit together.
    """
    # Cheap checks come first: files before a download, all of them before the weights.
    files, eval_files = find_data_files(config.data.files), find_data_files(config.data.eval_files, "--eval-data")
    check_paths(
        {"--model": config.model.path, "--adapter": config.model.adapter, "--data": files, "--eval-data": eval_files},
        [Written("--output", config.output, is_directory=True)],
    )
    model_files = ModelFiles.open(config.model.path)
    model = read_model_config(model_files, config.model.ignored_keys)
    given, config = config, config.resolved(model.max_position_embeddings)
    tokenizer = Tokenizer.open(model_files, config.model.ignored_keys)
    tokenizer.check_template_variables(config.chat.variables)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.vocab_size}")

    def examples(files: list[str]) -> Examples:
        records = read_train_records(
            files,
            raw=config.data.raw,
            variables=config.chat.variables,
            max_line_bytes=parse_bytes(config.data.max_line_size),
        )
        return make_examples(records, tokenizer, max_length=config.data.max_length, bad_records=config.data.bad_records)

    training, evaluation = examples(files), examples(eval_files) if eval_files else None
    num_steps = config.steps or math.ceil(config.epochs * rows_per_epoch(training, config.data) / config.batch_size)
    num_warmup_steps(config.optimizer, num_steps)  # raises UsageError if it is longer than the run
    notes = tuple(_notes(given, config, training, num_steps))
    return RunInputs(config, model_files, tokenizer, model, training, evaluation, num_steps, notes)


def _notes(given: FinetuneConfig, config: FinetuneConfig, training: Examples, num_steps: int) -> Iterator[str]:
    """Yield what a user may not expect of the run, each with what to set."""
    if given.data.max_length > config.data.max_length:
        yield (
            f"data.max_length is {config.data.max_length}, the context of the model; {given.data.max_length} was "
            f"{'the default' if given.data.max_length == DataOptions.max_length else 'given'}"
        )
    rows = rows_per_epoch(training, config.data)
    if rows < config.batch_size:
        yield (
            f"the data fills {rows:.1f} rows, so a batch of {config.batch_size} repeats it; set a smaller --batch-size or "
            "give more data"
        )
    if num_steps < MIN_STEPS:
        yield (
            f"{num_steps} {'step is' if num_steps == 1 else 'steps are'} too few to learn much at a learning rate of "
            f"{config.optimizer.learning_rate:g}; set --steps, --config.epochs or a smaller --batch-size"
        )


def finetune(
    config: FinetuneConfig,
    *,
    callback: StepCallback = lambda metrics: None,
    log: Callable[[str], None] = lambda text: None,
) -> TrainSummary:
    """Train a model or an adapter as `qwen-dist finetune` does. Arguments and errors as in `prepare` and `train`."""
    return train(prepare(config), callback=callback, log=log)


def train(
    inputs: RunInputs,
    *,
    callback: StepCallback = lambda metrics: None,
    log: Callable[[str], None] = lambda text: None,
    load_progress: ProgressCallback | None = None,
) -> TrainSummary:
    """Train, from the newest checkpoint in the output directory if there is one.

    Args:
      inputs: from `prepare`, the same on every process.
      callback: called after every step.
      log: called with a sentence at each stage of the run.
      load_progress: see `checkpoint.load.load`.

    Raises:
      UserError: the output belongs to another run, the model cannot be loaded, or the loss is not finite.
    """
    config, output = inputs.config, pathlib.Path(inputs.config.output)
    with contextlib.ExitStack() as stack:
        with sync_processes("preparing the output"):
            if jax.process_index() == 0:
                is_run = _open_output(output)
                stack.enter_context(run_lock(str(output / "run.lock"), str(output), log))
        # An earlier run is removed only after everything that this one reads has been read.
        setup = set_up(inputs, load_progress) if config.overwrite else None
        if setup is not None:
            with sync_processes("removing the earlier run"):
                if jax.process_index() == 0 and is_run:
                    _remove_run(output)
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(output / "checkpoints", keep=config.max_to_keep, keep_best=config.keep_best))
        )
        start = _Start(inputs, checkpoints, log)
        setup = setup or set_up(inputs, load_progress)
        if note := setup.model.sharding_ctx.replicated_note(inputs.model.vocab_size):
            log(note)
        state, batches, found = start.restore(setup)
        metrics_log = MetricsLog(
            output, done=found, tensorboard=config.tensorboard, is_first=jax.process_index() == 0, log=log
        )
        with contextlib.closing(metrics_log), _sigterm_event() as stop_requested:
            loop = _TrainLoop(inputs, setup, checkpoints, metrics_log, callback, stop_requested)
            state, step = loop.train(state, batches, found)
        if step < inputs.num_steps:
            return TrainSummary(step, loop.loss, loop.eval_loss, True, "")
        result = _write_result(inputs, setup, state, log)
    return TrainSummary(step, loop.loss, loop.eval_loss, False, str(result))


class _Start:
    """Where a run starts: after the newest checkpoint that can be read, or from the beginning."""

    def __init__(self, inputs: RunInputs, checkpoints: Checkpoints, log: Callable[[str], None]):
        """Read the position of the newest whole checkpoint. Raises UserError if it is that of another run."""
        self._inputs, self._checkpoints, self._log = inputs, checkpoints, log
        self._steps = checkpoints.steps  # without those that turned out to be damaged
        self._damaged: dict[int, str] = {}
        position = self._newest(checkpoints.position)
        if position is not None:
            _check_same_run(position["run"], fingerprint(inputs))

    def restore(self, setup: TrainSetup) -> tuple[TrainState, BatchIterator, int]:
        """Return the state, the data from there on, and the number of steps done.

        Damaged checkpoints are renamed once an older one has been read, so that the run can write theirs again.

        Raises:
          UserError: there are checkpoints, and none can be read; they stay as they are.
        """
        config, trainer = self._inputs.config, setup.trainer

        batches = training_batches(self._inputs.training, config.data, config.batch_size)

        def read(step: int) -> TrainState:
            where = f"the checkpoint {config.output}/checkpoints/{step}"
            state, position = self._checkpoints.restore(step, trainer.abstract_state()), self._checkpoints.position(step)
            if int(state.step) != step:  # the folder was copied or renamed
                raise UserError(f"{where} has the state after step {int(state.step)}")
            try:
                batches.set_state(position["data"])
                next(batches)  # a wrong position may show only now
                batches.set_state(position["data"])
            except Exception as error:  # the reader of a damaged position can raise anything
                raise UserError(f"{where} has no position in the data ({type(error).__name__})") from error
            return state

        found = self._newest(read)
        if found is None:
            return trainer.init_state(), batches, 0
        for step, problem in self._damaged.items():
            with sync_processes("leaving out a damaged checkpoint"):
                moved = self._checkpoints.set_aside(step)
            self._log(f"{problem}; it is left out, and is now {moved}")
        if self._damaged:
            self._checkpoints.reload()
        self._log(f"resuming after step {self._steps[-1]} of {self._inputs.num_steps}")
        return found, batches, self._steps[-1]

    def _newest(self, read: Callable[[int], Any]) -> Any:
        """Return what `read` returns of the newest checkpoint that all processes can read; None without checkpoints."""
        while self._steps:
            value, problem = None, ""
            try:
                value = read(self._steps[-1])
            except UserError as error:
                problem = str(error)
            if not _any_process(bool(problem)):
                return value
            step = self._steps.pop()
            self._damaged[step] = problem or f"the checkpoint of step {step} cannot be read by another process"
        if self._damaged:
            newest, *older = self._damaged.values()
            others = f"the {len(older)} older ones cannot be read either" if older else "there is no other"
            raise UserError(
                f"{newest}, and {others}: remove {self._inputs.config.output}/checkpoints or use --overwrite to start over"
            )
        return None


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A model with its trainer. `lora` are the options of the trained adapter, also when it was loaded."""

    model: LoadedModel
    trained: list[str]
    trainer: Trainer
    lora: LoraOptions


def set_up(inputs: RunInputs, load_progress: ProgressCallback | None = None) -> TrainSetup:
    """Load the model and make its trainer.

    Raises:
      UserError: the model, the adapter or the mesh cannot be used.
    """
    config = inputs.config
    read = read_adapter(config.model.adapter, config.model.ignored_keys) if config.model.adapter else None
    adapter = read.to_lora() if read and config.method == "lora" else None
    model = load_model(
        inputs.files,
        _sharding_ctx(inputs),
        dtype=_base_dtype(config),
        load_format=config.model.load_format,
        ignored_config_keys=config.model.ignored_keys,
        adapter=read if config.method == "full" else None,
        quantize=_quantize(config),
        host_memory_budget=config.model.host_memory_bytes,
        progress=load_progress,
    )
    if config.method == "full":
        return _with_trainer(inputs, model, list(model.parameters), config.lora)
    if adapter is not None:
        lora = dataclasses.replace(config.lora, rank=adapter.rank, alpha=adapter.alpha, use_rslora=adapter.rslora)
        return _with_trainer(inputs, *with_adapter(model, adapter, dtype=_trained_dtype(config)), lora)
    return _with_trainer(inputs, *new_adapter(model, config.lora, dtype=_trained_dtype(config)), config.lora)


def set_up_abstract(inputs: RunInputs) -> TrainSetup:
    """Return the same as `set_up` without weights, for `--dry-run`; an adapter to be loaded counts as a new one.

    Raises:
      UserError: the mesh or the LoRA targets do not fit the model.
    """
    config = inputs.config
    module = Transformer(inputs.model, dtype=_base_dtype(config))
    if (quantization := _quantization(inputs)) is not None:
        quantization.declare(module)
    names = None if config.method == "full" else attach_lora(module, config.lora, dtype=_trained_dtype(config))
    leaves: Any = abstract_parameters(module, _sharding_ctx(inputs))
    model = LoadedModel(inputs.model, module, leaves, _sharding_ctx(inputs))
    return _with_trainer(inputs, model, list(leaves) if names is None else names, config.lora)


def _sharding_ctx(inputs: RunInputs) -> ShardingContext:
    text = inputs.config.mesh
    if text:
        return ShardingContext(make_mesh(MeshConfig.parse(text)), TRAIN)
    quantization = _quantization(inputs)
    units = {} if quantization is None else quantization.num_units(inputs.model, _base_dtype(inputs.config))
    return ShardingContext(make_mesh(training_mesh(inputs.model, jax.devices(), units)), TRAIN)


def _quantize(config: FinetuneConfig) -> QuantizeOptions | Literal["stored", "none"]:
    """Return how the weights are kept: under an adapter as the configuration says, and as floats if they are trained."""
    return "none" if config.method == "full" else QuantizeOptions.of_model(config.model)


def _quantization(inputs: RunInputs) -> Quantization | None:
    return Quantization.of(inputs.files.config, _quantize(inputs.config))


def _trained_dtype(config: FinetuneConfig) -> jax.numpy.dtype:
    dtype = jax.numpy.dtype(config.model.dtype)
    return accum_dtype(dtype) if config.master_weights else dtype


def _base_dtype(config: FinetuneConfig) -> jax.numpy.dtype:
    """Return the dtype of the loaded weights. Under an adapter they are frozen: the dtype of the computation is enough."""
    return _trained_dtype(config) if config.method == "full" else jax.numpy.dtype(config.model.dtype)


def _with_trainer(inputs: RunInputs, model: LoadedModel, trained: list[str], lora: LoraOptions) -> TrainSetup:
    config = inputs.config
    schedule = make_schedule(config.optimizer, inputs.num_steps)
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
    return TrainSetup(model, trained, trainer, lora)


class _TrainLoop:
    """The training loop: steps, evaluations, metrics and checkpoints.

    Attributes:
      loss: of the last step.
      eval_loss: of the last evaluation.
    """

    def __init__(
        self,
        inputs: RunInputs,
        setup: TrainSetup,
        checkpoints: Checkpoints,
        metrics_log: MetricsLog,
        callback: StepCallback,
        stop_requested: threading.Event,
    ):
        self._inputs, self._config, self._trainer = inputs, inputs.config, setup.trainer
        self._checkpoints, self._metrics_log = checkpoints, metrics_log
        self._callback, self._stop_requested = callback, stop_requested
        self._fingerprint = fingerprint(inputs)
        self._flops = StepFlops(setup.model, setup.trained)
        self._peak_flops_per_second = peak_flops_per_second(
            setup.model.sharding_ctx.mesh.devices.flatten(), setup.trainer.dtype
        )
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def train(self, state: TrainState, batches: BatchIterator, step: int) -> tuple[TrainState, int]:
        """Train until the last step or a request to stop, then save. Returns the state and the number of steps done."""
        num_steps, config = self._inputs.num_steps, self._config
        batch, must_stop = next(batches), False
        while step < num_steps and not must_stop:
            start, position = time.monotonic(), batches.get_state()
            state, result = self._trainer.step(state, batch.microbatches(config.num_microbatches))
            next_batch = next(batches)  # made while the devices compute
            loss, norm, rate = (float(value) for value in jax.device_get(result))
            step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(self._describe_non_finite(step, batch, loss, norm))
            self.loss = loss
            seconds = time.monotonic() - start
            num_tokens, mfu = int((batch.positions >= 0).sum()), self._utilization(batch, seconds)
            metrics = StepMetrics(step, num_steps, loss, norm, rate, seconds, num_tokens, mfu)
            must_stop = _any_process(self._stop_requested.is_set())
            is_last = step == num_steps
            if self._inputs.evaluation is not None and (is_last or _is_due(step, config.eval_every)):
                metrics.eval_loss = self.eval_loss = self._evaluate(state)
            self._report(metrics)
            if is_last or must_stop or _is_due(step, config.save_every):
                self._checkpoints.save(step, state, {"data": position, "run": self._fingerprint}, self.eval_loss)
            batch = next_batch
        return state, step

    def _utilization(self, batch: TrainBatch, seconds: float) -> float | None:
        peak = self._peak_flops_per_second
        return None if peak is None else self._flops(batch.positions) / (seconds * peak)

    def _evaluate(self, state: TrainState) -> float:
        """Return the mean loss of the target tokens of the evaluation data."""
        assert self._inputs.evaluation is not None
        total, count = 0.0, 0
        size = self._config.batch_size // self._config.num_microbatches
        for batch in evaluation_batches(self._inputs.evaluation, self._config.data, size):
            loss, num_targets = jax.device_get(self._trainer.evaluate(state, batch))
            total, count = total + float(loss), count + int(num_targets)
        return total / max(count, 1)

    def _report(self, metrics: StepMetrics) -> None:
        names = ("loss", "gradient_norm", "learning_rate", "seconds", "num_tokens", "mfu", "eval_loss")
        known = {name: value for name in names if (value := getattr(metrics, name)) is not None}
        self._metrics_log.add(metrics.step, known)
        self._callback(metrics)

    def _describe_non_finite(self, step: int, batch: TrainBatch, loss: float, norm: float) -> str:
        path = pathlib.Path(self._config.output) / f"batch-{step}.npz"
        where = f"The batch is in {path}"
        if jax.process_index() == 0:
            try:
                np.savez(path, **{name: value for name, value in batch._asdict().items() if value is not None})
            except OSError as error:
                where = f"The batch cannot be written to {path} ({error.strerror})"
        saved = self._checkpoints.latest
        return (
            f"step {step}: the loss is {loss} and the gradient norm is {norm}, so the run has stopped. {where}; "
            f"{f'the newest checkpoint is of step {saved}' if saved else 'there is no checkpoint'}. "
            "Try a lower optimizer.learning_rate, or float32."
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _any_process(flag: bool) -> bool:
    """Return whether the flag is set on any process: all must stop after the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def _sigterm_event() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets while the block runs. Outside the main thread nothing sets it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def fingerprint(inputs: RunInputs) -> dict[str, Any]:
    """Return what identifies a run, as JSON values: its checkpoints can only be resumed with an equal fingerprint."""
    fields = dataclasses.asdict(inputs.config)
    kept = {name: value for name, value in fields.items() if name not in _RESUMABLE_CHANGES}
    kept["data"] = kept["data"] | {"tokens": _data_digest(inputs.training)}
    # The digest has what the files and the chat template make of them.
    for name in ("eval_files", "files", "max_line_size"):
        del kept["data"][name]
    del kept["chat"]
    return json.loads(json.dumps(kept))


def _data_digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def _check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = flatten(found), flatten(wanted)
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        lines = [f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in different]
        raise UserError(
            "the output directory has checkpoints of another run:\n  - "
            + "\n  - ".join(lines)
            + "\nUse another output, or replace this run with --overwrite."
        )


def _open_output(output: pathlib.Path) -> bool:
    """Create the directory of a run, or open that of an earlier one. Returns whether there was one."""
    try:
        is_run = RUN_MARKER.check(output, "--output")
        output.mkdir(parents=True, exist_ok=True)
        if not is_run:
            RUN_MARKER.write(output)
    except OSError as error:
        raise UsageError(f"--output {printable(output)} cannot be written: {error.strerror}") from None
    return is_run


def _remove_run(output: pathlib.Path) -> None:
    """Remove what an earlier run has written; other files in its directory stay."""
    try:
        for path in [path for pattern in _RUN_DIRECTORIES + _RUN_FILES for path in output.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise UserError(f"the earlier run in {printable(output)} cannot be removed: {error.strerror}") from None


def _write_result(inputs: RunInputs, setup: TrainSetup, state: TrainState, log: Callable[[str], None]) -> pathlib.Path:
    """Write the adapter in PEFT's layout, or the model as a Hugging Face directory, in the dtype of the computation."""
    config, output = inputs.config, pathlib.Path(inputs.config.output)
    if config.method == "lora":
        log(f"writing the adapter: {output / 'adapter'}")
        adapter: Adapter = extract_adapter(state.parameters, setup.lora, setup.model)
        write_adapter(output / "adapter", adapter, base=config.model.path)
        return output / "adapter"
    log(f"writing the model: {output / 'model'}")
    save_model(
        setup.model,
        setup.trainer.parameters(state),
        output / "model",
        dtype=config.model.dtype,
        extra_files=_with_trained_ends(inputs),
        overwrite=True,
    )
    return output / "model"


def _with_trained_ends(inputs: RunInputs) -> dict[str, bytes]:
    """Return generation_config.json with the tokens that end the trained answers, if it does not have them yet.

    A base model ends texts with another token than the chat template, and would not stop after an answer.
    """
    missing = inputs.training.ends_of_targets(inputs.tokenizer) - inputs.tokenizer.stop_ids
    if not missing:
        return {}
    content = dict(inputs.files.read_object(GENERATION_CONFIG) or {})
    content["eos_token_id"] = sorted(inputs.tokenizer.stop_ids) + sorted(missing)
    return {GENERATION_CONFIG: json.dumps(content, indent=2).encode()}
