"""Load a checkpoint, or load and save it, and report the growth of the process's memory; for test_memory.py."""

import json
import sys

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen_dist.checkpoint import buffers
from qwen_dist.checkpoint import load as loading
from qwen_dist.checkpoint.save import export
from qwen_dist.checkpoint.source import open_checkpoint


def status(key):
    """Return a size from /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def start_measuring():
    """Reset the peak memory; return the memory in use."""
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    return status("VmRSS")


def main():
    folder, budget, kind, where, *output = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    if where == "devices":
        loading.is_on_host = buffers.is_on_host = lambda parameter: False
    checkpoint = open_checkpoint(folder)
    spec = {"rows": PartitionSpec("x"), "columns": PartitionSpec(None, "x"), "replicated": PartitionSpec()}[kind]
    target = {
        name.removeprefix("model."): jax.ShapeDtypeStruct(
            info.shape, info.dtype.numpy, sharding=NamedSharding(mesh, spec if len(info.shape) > 1 else PartitionSpec())
        )
        for name, info in checkpoint.tensors.items()
    }
    jax.block_until_ready([jax.device_put(0.0, device) for device in jax.devices()])
    before = start_measuring()
    arrays = loading.load(checkpoint, target, host_memory_budget=int(budget))
    growth = status("VmHWM") - before
    if output:
        before = start_measuring()
        export(checkpoint, arrays, output[0], host_memory_budget=int(budget))
        print(json.dumps({"growth": status("VmHWM") - before}))
        return
    distinct = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for a in arrays.values() for shard in a.addressable_shards
    }
    print(json.dumps({"growth": growth, "arrays": sum(distinct.values()), "bytes": checkpoint.nbytes}))


if __name__ == "__main__":
    main()
