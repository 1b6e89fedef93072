"""`qwen-dist parity`: compare with PyTorch, component by component."""

from __future__ import annotations

import json
import sys
import warnings

from qwen_dist.cli.console import make_console
from qwen_dist.cli.flags import DeviceFlags, Verb
from qwen_dist.cli.session import paths_read
from qwen_dist.config import ParityConfig
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import find_devices, start_jax

EXAMPLES = """\
examples:
  qwen-dist parity --model ~/qwen3-0.6b --dtype float32
  qwen-dist parity --model ~/qwen3-0.6b --dtype bfloat16 --prompt "Why is the sky blue?" --report parity.html
  qwen-dist parity --model ~/qwen3-0.6b --dtype bfloat16 --quantize int4 --kl text.txt
exit code 1 if a component differs by more than its bound; needs the extra: pip install 'qwen-dist[parity]'"""


def run(config: ParityConfig, flags: DeviceFlags) -> int:
    """Print the comparison, and write its page."""
    if config.kl:
        return _compare_distributions(config, flags)
    read = paths_read(config.model.path, flags.config)
    check_paths(read, [Written("--report", config.report, is_page=True)])
    start_jax(flags.num_cpu_devices, config.model.dtype)
    find_devices()
    from qwen_dist.parity.page import write_html
    from qwen_dist.parity.report import print_report
    from qwen_dist.parity.run import ParityOptions, run_parity
    from qwen_dist.runtime.stderr_filter import dropped_lines
    from qwen_dist.storage.model_files import ModelFiles

    options = ParityOptions(
        model=str(ModelFiles.open(config.model.path).directory()),
        dtype=config.model.dtype,
        prompts=config.prompts,
        tokens=config.tokens,
        mesh=config.mesh,
        ignored_keys=tuple(config.model.ignored_keys),
    )
    with dropped_lines(r"Involuntary full rematerialization|past_key_values.*deprecated"), warnings.catch_warnings():
        # transformers says it once as a log line and once as a warning; its first releases have no other name.
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        report = run_parity(options, progress=lambda stage: print(stage, file=sys.stderr))
    if flags.json:
        print(json.dumps(report.to_json()))
    else:
        print_report(report, make_console())
    if config.report:
        write_html(report, config.report)
    return 0 if report.ok else 1


def _compare_distributions(config: ParityConfig, flags: DeviceFlags) -> int:
    """Print how far the distributions of two models are apart."""
    start_jax(flags.num_cpu_devices, config.model.dtype)
    find_devices()
    from qwen_dist.parity.kl import KlOptions, compare_distributions

    model = config.model
    options = KlOptions(
        model=model.path,
        reference=config.kl_reference,
        text=config.kl,
        dtype=model.dtype,
        quantize=model.quantize,
        group_size=model.quantize_group_size,
        has_head=model.quantize_head,
        kv_cache=model.kv_cache_dtype,
        max_tokens=config.kl_tokens,
        mesh=config.mesh,
        ignored_keys=tuple(model.ignored_keys),
    )
    report = compare_distributions(options, progress=lambda stage: print(stage, file=sys.stderr))
    print(json.dumps(report.to_json()) if flags.json else report)
    return 0


VERB = Verb("parity", ParityConfig, DeviceFlags, run, EXAMPLES)
