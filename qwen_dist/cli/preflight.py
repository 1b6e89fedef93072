"""`qwen-dist preflight`: check processes and devices before a run."""

from __future__ import annotations

from qwen_dist.cli.console import print_devices
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import joined
from qwen_dist.config import PreflightConfig
from qwen_dist.errors import UserError
from qwen_dist.runtime.backend import start_jax

EXAMPLES = """\
examples, the same command on every host:
  qwen-dist preflight --model ~/qwen3-8b --mesh fsdp=2,tensor=8          on a TPU pod, GKE or Slurm
  qwen-dist preflight --coordinator host-a:8482 --num-processes 2 --process-id 0
every run with several processes starts with the same checks"""


def run(config: PreflightConfig, flags: ProcessFlags) -> int:
    """Join the processes, compute a sum over all devices and print processes, devices and mesh."""
    with joined("preflight", config, flags) as processes:
        start_jax(flags.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        import jax

        from qwen_dist.mesh import MeshConfig, make_mesh, sum_over_devices
        from qwen_dist.sharding import INFERENCE, ShardingContext

        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(config.mesh or "fsdp=-1")), INFERENCE)
        total = sum_over_devices(sharding_ctx.mesh)
        if total != sharding_ctx.mesh.size:
            raise UserError(
                f"preflight: the sum of a 1 from each of {sharding_ctx.mesh.size} devices is {total}: the network or a "
                "device is faulty"
            )
        print_devices(processes, jax.devices(), sharding_ctx, as_json=flags.json)
    return 0


VERB = Verb("preflight", PreflightConfig, ProcessFlags, run, EXAMPLES)
