"""One of two processes that load a mixture of experts; reports the bytes it read and the growth of its memory."""

import json
import sys

import jax

from qwen_dist.checkpoint.load import load, make_load_plan
from qwen_dist.checkpoint.model import abstract_model
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.sharding import INFERENCE, ShardingContext


def number_in(path, key):
    with open(path) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def main():
    folder, budget, address, index = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse("expert=8")), INFERENCE)
    checkpoint = open_checkpoint(folder)
    model = abstract_model(checkpoint, sharding_ctx, "bfloat16")
    options = {"disk_shapes": model.disk_shapes, "tied": model.is_tied, "host_memory_budget": int(budget)}
    plan = make_load_plan(checkpoint, model.target, **options)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the peak
    before, read = number_in("/proc/self/status", "VmRSS"), number_in("/proc/self/io", "rchar")
    arrays = load(checkpoint, model.target, **options)
    read = number_in("/proc/self/io", "rchar") - read
    growth = 1024 * (number_in("/proc/self/status", "VmHWM") - before)
    distinct = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for a in arrays.values() for shard in a.addressable_shards
    }
    held = sum(distinct.values())
    experts = sum(s.data.nbytes for n, a in arrays.items() if ".experts." in n for s in a.addressable_shards)
    found = {"growth": growth, "held": held, "experts": experts, "read": read, "planned": plan.bytes_read}
    print(json.dumps(found | {"bytes": checkpoint.nbytes}))


if __name__ == "__main__":
    main()
