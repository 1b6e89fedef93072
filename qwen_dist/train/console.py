"""What a person sees of training: the data with its loss mask, what would be trained, and how a run goes."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from qwen_dist.checkpoint.names import group_names
from qwen_dist.train.batches import rows_per_epoch
from qwen_dist.train.examples import describe_bad
from qwen_dist.train.run import Prepared, Progressing, Setup, Watcher

if TYPE_CHECKING:
    from rich.console import Console

# Lines of a run nobody watches: one in so many seconds.
LOG_EVERY_S = 10.0


def show_data(prepared: Prepared, count: int, console: Console) -> None:
    """The first examples, token by token: what is to be learnt in green and underlined, what is only read dim."""
    from rich.text import Text

    for example in prepared.training.examples[:count]:
        learnt = int(example.is_learnt.sum())
        console.print(f"[bold]{example.source}[/] {len(example.tokens)} tokens, {learnt} to be learnt", highlight=False)
        text = Text()
        for id, is_learnt in zip(example.tokens, example.is_learnt, strict=True):
            piece = prepared.tokenizer.token_bytes(int(id)).decode("utf-8", "replace")
            text.append(piece.replace("\n", "⏎\n"), style="green underline" if is_learnt else "dim")
        console.print(text)


def describe_data(prepared: Prepared) -> str:
    """How many examples and tokens there are, what was left out, and how long the run is."""
    training, config = prepared.training, prepared.config
    rows = rows_per_epoch(training, config.data)
    lines = [
        f"{len(training):,} examples of {training.num_positions:,} tokens, {training.num_learnt:,} of them to be learnt",
        f"{prepared.num_steps:,} steps of {config.batch_size} rows of at most {config.data.max_length} tokens: "
        f"{prepared.num_steps * config.batch_size / rows:.2f} epochs",
    ]
    return "\n".join(lines + ([describe_bad(training.bad)] if training.bad else []))


def describe_training(setup: Setup, prepared: Prepared) -> str:
    """What would be trained, by name and shape, and the bytes that it takes on each device without activations."""
    model, state = setup.model, setup.trainer.abstract_state()
    total = sum(value.size for value in model.parameters.values())
    trained = sum(value.size for value in state.parameters.values())
    lines = [f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%), {_types(setup)}:"]
    for label, names in group_names(state.parameters).items():
        leaf = state.parameters[names[0]]
        lines.append(f"  {label} {list(leaf.shape)} {leaf.dtype}" + (f" × {len(names)}" if len(names) > 1 else ""))
    parts = {
        "parameters": _local_bytes(model.parameters),
        "gradients": _local_bytes(state.parameters),
        "optimizer": _local_bytes(state.optimizer),
    }
    sizes = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in parts.items())
    lines.append(f"on each device: {sizes}; activations of a batch come on top (remat: {prepared.config.remat})")
    return "\n".join([*lines, model.sharding_ctx.describe()])


def _types(setup: Setup) -> str:
    kept = {str(leaf.dtype) for leaf in setup.trainer.abstract_state().parameters.values()}
    return f"kept in {', '.join(sorted(kept))} and used in {jax.numpy.dtype(setup.trainer.dtype).name}"


def _local_bytes(tree: object) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


@contextlib.contextmanager
def watching(console: Console, *, done: int = 0) -> Iterator[Watcher]:
    """Shows every step in a bar where somebody watches, and a line now and then where not."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, completed=done, numbers="")
        last_line = 0.0

        def watch(progress: Progressing) -> None:
            nonlocal last_line
            numbers = describe_step(progress)
            bar.update(task, total=progress.num_steps, completed=progress.step, numbers=numbers)
            is_special = progress.step == progress.num_steps or progress.eval_loss is not None
            if not console.is_terminal and (is_special or time.monotonic() - last_line > LOG_EVERY_S):
                last_line = time.monotonic()
                left = (progress.num_steps - progress.step) * progress.seconds
                text = f"step {progress.step}/{progress.num_steps}: {numbers}, {left / 60:.0f} min left"
                console.print(text, highlight=False, soft_wrap=True)

        yield watch


def describe_step(progress: Progressing) -> str:
    """Loss, speed and memory of one step."""
    text = (
        f"loss {progress.loss:.4f}, {progress.num_tokens / progress.seconds:,.0f} tokens/s, {progress.seconds:.2f} s a step"
    )
    if progress.mfu is not None:
        text += f", MFU {100 * progress.mfu:.1f}%"
    if progress.eval_loss is not None:
        text += f", evaluation {progress.eval_loss:.4f}"
    return f"{text}, {peak_memory() / 1e9:.2f} GB"


def peak_memory() -> int:
    """The most bytes that were in use at once: of a device where it counts them, else of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
