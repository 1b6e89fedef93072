"""`qwen-dist finetune`: train a model or an adapter on your data."""

from __future__ import annotations

import dataclasses

from qwen_dist.cli.commands import EXIT_SIGTERM
from qwen_dist.cli.console import make_console, print_training
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import joined
from qwen_dist.config import FinetuneConfig
from qwen_dist.config_fields import option
from qwen_dist.runtime.backend import start_jax

EXAMPLES = """\
examples:
  qwen-dist finetune --config configs/finetune_lora.py --model ~/qwen3-0.6b --data chats.jsonl --output run --steps 100
  qwen-dist finetune --config configs/finetune_full.py --model ~/qwen3-0.6b --data chats.jsonl --output run --dry-run
  qwen-dist finetune --model ~/qwen3-0.6b --quantize int4 --data chats.jsonl --output run
  qwen-dist finetune --model ~/qwen3-0.6b --data chats.jsonl --output run --show-data 2
  qwen-dist generate --model ~/qwen3-0.6b --adapter run/adapter
an interrupted run resumes from its newest checkpoint; SIGTERM saves first (exit code 75)"""


@dataclasses.dataclass(frozen=True)
class FinetuneFlags(ProcessFlags):
    """Flags that print something instead of training."""

    show_data: int | None = option(
        None, flag="--show-data", metavar="N", help="print N examples with the loss mask, and exit"
    )
    dry_run: bool = option(False, flag="--dry-run", help="print what would be trained, and exit")


def run(config: FinetuneConfig, flags: FinetuneFlags) -> int:
    """Train, or resume the run in the output directory."""
    with joined("finetune", config, flags) as processes:
        from qwen_dist.ops.malloc import dispatch_synchronously, keep_freed_memory

        start_jax(flags.num_cpu_devices, config.model.dtype)
        dispatch_synchronously()
        processes.check_devices()
        from qwen_dist.train.console import describe_data, describe_training, progress_bar, show_data
        from qwen_dist.train.run import prepare, set_up_abstract, train

        prepared = prepare(config)
        if flags.show_data is not None:
            show_data(prepared, flags.show_data, make_console())
            return 0
        console = make_console(stderr=True, quiet=flags.json or not processes.is_main)
        if flags.dry_run:
            print(describe_data(prepared))
            print(describe_training(set_up_abstract(prepared), prepared))
            return 0
        console.print(describe_data(prepared), highlight=False, soft_wrap=True)
        keep_freed_memory()

        def log(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        with progress_bar(console, prepared.num_steps) as callback:
            summary = train(prepared, callback=callback, log=log)
        print_training(summary, as_json=flags.json)
    return EXIT_SIGTERM if summary.is_stopped else 0


VERB = Verb("finetune", FinetuneConfig, FinetuneFlags, run, EXAMPLES)
