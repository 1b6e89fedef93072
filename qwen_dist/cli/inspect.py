"""`qwen-dist inspect`: show what a checkpoint holds and what loading costs."""

from __future__ import annotations

from qwen_dist.cli.console import make_console, print_kernels
from qwen_dist.cli.flags import DeviceFlags, Verb
from qwen_dist.config import InspectConfig
from qwen_dist.runtime.backend import find_devices, start_jax

EXAMPLES = """\
examples:
  qwen-dist inspect ~/qwen3-0.6b
  qwen-dist inspect Qwen/Qwen3-8B --mesh fsdp=4,tensor=2 --json
  qwen-dist inspect --kernels                            the operations, and what runs on this machine
reads headers and configuration only; exit code 1 if there are problems"""


def run(config: InspectConfig, flags: DeviceFlags) -> int:
    """Print a report about a checkpoint, or about the kernels."""
    if config.kernels:
        find_devices()
        print_kernels(as_json=flags.json)
        return 0
    from qwen_dist.mesh import MeshConfig, make_mesh

    mesh = MeshConfig.parse(config.mesh)
    # Nothing is computed, so there can be as many CPU devices as the mesh needs.
    start_jax(flags.num_cpu_devices or mesh.num_devices, config.model.dtype)
    find_devices()
    from qwen_dist.checkpoint.inspect import inspect
    from qwen_dist.checkpoint.model import abstract_model
    from qwen_dist.sharding import INFERENCE, ShardingContext

    sharding_ctx = ShardingContext(make_mesh(mesh), INFERENCE)
    report = inspect(
        config.model.path,
        lambda checkpoint: abstract_model(
            checkpoint, sharding_ctx, config.model.dtype, config.model.ignored_keys, quantize="stored"
        ),
        host_memory_budget=config.model.host_memory_bytes,
    )
    if flags.json:
        print(report.to_json())
    else:
        report.print(make_console())
    return 1 if report.problems else 0


VERB = Verb(
    "inspect",
    InspectConfig,
    DeviceFlags,
    run,
    EXAMPLES,
    usage="qwen-dist inspect DIR_OR_HUB_ID [flags] | qwen-dist inspect --kernels",
)
