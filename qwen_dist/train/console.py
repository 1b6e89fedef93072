"""Terminal output of training: the data with its loss mask, the trained parameters, and the progress of a run."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from qwen_dist.checkpoint.names import group_names
from qwen_dist.errors import printable
from qwen_dist.train.batches import rows_per_epoch
from qwen_dist.train.examples import describe_bad_records
from qwen_dist.train.run import RunInputs, StepCallback, StepMetrics, TrainSetup

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two lines when the output is not a terminal.
LOG_INTERVAL_S = 10.0


def show_data(inputs: RunInputs, count: int, console: Console) -> None:
    """Print the first `count` examples: tokens in the loss green and underlined, the others dim.

    Where there are no colors, as in a pipe, the parts in the loss are between ⟦ and ⟧.
    """
    from rich.text import Text

    for example in inputs.training.examples[:count]:
        num_targets = int(example.loss_mask.sum())
        header = f"[bold]{example.location}[/] {len(example.tokens)} tokens, {num_targets} in the loss"
        console.print(header, highlight=False)
        text, was_target = Text(), False
        for id, is_target in zip(example.tokens, example.loss_mask, strict=True):
            token = inputs.tokenizer.token_bytes(int(id)).decode("utf-8", "replace")
            if console.color_system is None and bool(is_target) != was_target:
                text.append("⟦" if is_target else "⟧")
            was_target = bool(is_target)
            text.append(_visible(token), style="green underline" if is_target else "dim")
        if console.color_system is None and was_target:
            text.append("⟧")
        console.print(text, soft_wrap=console.color_system is None)


def _visible(token: str) -> str:
    """Return the text of a token with its line ends marked and other control characters escaped."""
    return "⏎\n".join(printable(part, len(part) * 10 + 1) for part in token.split("\n"))


def describe_data(inputs: RunInputs) -> str:
    """Return a text with the number of examples and tokens, the length of the run, and the bad records."""
    training, config = inputs.training, inputs.config
    rows = rows_per_epoch(training, config.data)
    lines = [
        f"{count(len(training), 'example')} with {count(training.num_positions, 'token')} in total, "
        f"{training.num_target_tokens:,} in the loss",
        f"{count(inputs.num_steps, 'step')} of {count(config.batch_size, 'row')} of at most {config.data.max_length} "
        f"tokens: {inputs.num_steps * config.batch_size / rows:.2f} epochs; "
        f"learning rate {config.optimizer.learning_rate:g}",
        *(f"note: {note}" for note in inputs.notes),
    ]
    return "\n".join(lines + ([describe_bad_records(training.bad)] if training.bad else []))


def count(number: int, noun: str) -> str:
    """Return a number with its noun, singular or plural."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_training(setup: TrainSetup, inputs: RunInputs) -> str:
    """Return a text with the names and shapes of the trained parameters, and the bytes per device without activations."""
    model, state = setup.model, setup.trainer.abstract_state()
    total = sum(model.num_elements().values())
    trained = sum(value.size for value in state.parameters.values())
    lines = [f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%), {_describe_dtypes(setup)}:"]
    for label, names in group_names(state.parameters).items():
        leaf = state.parameters[names[0]]
        lines.append(f"  {label} {list(leaf.shape)} {leaf.dtype}" + (f" × {len(names)}" if len(names) > 1 else ""))
    num_bytes = {
        "parameters": _bytes_per_device(model.parameters),
        "gradients": _bytes_per_device(state.parameters),
        "optimizer": _bytes_per_device(state.optimizer),
    }
    sizes = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in num_bytes.items())
    lines.append(f"on each device: {sizes}; the activations of a batch are extra (remat: {inputs.config.remat})")
    return "\n".join([*lines, model.sharding_ctx.describe()])


def _describe_dtypes(setup: TrainSetup) -> str:
    stored = {str(leaf.dtype) for leaf in setup.trainer.abstract_state().parameters.values()}
    return f"stored in {', '.join(sorted(stored))} and used in {jax.numpy.dtype(setup.trainer.dtype).name}"


def _bytes_per_device(tree: object) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


@contextlib.contextmanager
def progress_bar(console: Console, num_steps: int) -> Iterator[StepCallback]:
    """Show a progress bar in a terminal, and a line every few seconds elsewhere. Gives the callback that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    times: list[tuple[float, int]] = []
    last_line = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task("", total=num_steps, metrics="compiling (once)…")

        def update(metrics: StepMetrics) -> None:
            nonlocal last_line
            # The first step compiles, so the rate is that of the steps after it.
            times.append((time.monotonic(), metrics.step))
            del times[1:-1]
            description = describe_step(metrics) + _time_left(times, metrics)
            bar.update(task, total=metrics.num_steps, completed=metrics.step, metrics=description)
            is_special = metrics.step == metrics.num_steps or metrics.eval_loss is not None
            if not console.is_terminal and (is_special or time.monotonic() - last_line > LOG_INTERVAL_S):
                last_line = time.monotonic()
                text = f"step {metrics.step}/{metrics.num_steps}: {description}"
                console.print(text, highlight=False, soft_wrap=True)

        yield update


def _time_left(times: list[tuple[float, int]], metrics: StepMetrics) -> str:
    (start, first), (now, step) = times[0], times[-1]
    if step == first or step == metrics.num_steps:
        return ""
    seconds = (now - start) / (step - first) * (metrics.num_steps - step)
    return f", left {int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe_step(metrics: StepMetrics) -> str:
    """Return a line with loss, speed and peak memory of one step."""
    text = f"loss {metrics.loss:.4f}, {metrics.num_tokens / metrics.seconds:,.0f} tokens/s, {metrics.seconds:.2f} s/step"
    if metrics.mfu is not None:
        text += f", MFU {100 * metrics.mfu:.1f}%"
    if metrics.eval_loss is not None:
        text += f", evaluation {metrics.eval_loss:.4f}"
    return f"{text}, {peak_memory_bytes() / 1e9:.2f} GB"


def peak_memory_bytes() -> int:
    """Return the peak memory of a device if it counts it, else of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
