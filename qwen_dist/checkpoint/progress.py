"""A progress bar for loads and saves: gigabytes done, gigabytes per second, time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qwen_dist.checkpoint.load import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(description: str, console: "Console") -> Iterator[Progress]:
    """Shows a bar on the console while the block runs; yields what `load` and `save` take as `progress`."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
