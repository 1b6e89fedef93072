"""Compare this loader with others on one machine and print a table.

    python benchmarks/loading.py [--gigabytes 6] [--repeats 3] [--cold] [--folder DIR]

Makes a checkpoint of random bytes in the shape of Qwen2.5-3B, with the number of layers that the size needs. Every run is a
separate process; the loaders take turns, and the table has the medians. A run ends when every page of every array has been
read once, so that a lazy memory map does not count as a load. *Memory* is the growth of the process's peak resident size
without the size of the arrays; it includes mapped pages of files. *CPU seconds* are those of the process (on a shared
machine they say more than the wall clock). *Read* counts the bytes that system calls returned (mapped files need none).
`--cold` drops the files from the page cache before every run.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EMBED, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 2048, 11008, 151_936, 16, 2, 128
LAYOUTS = {"1 device": (1, None), "8 devices, rows": (8, 0), "8 devices, columns": (8, 1)}
INDEX = "model.safetensors.index.json"


# --- the checkpoint -----------------------------------------------------------------------------------------


def make_checkpoint(folder, gigabytes):
    """Write the checkpoint in files of half a gigabyte (the library makes several copies); return its size in bytes."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy

    tile = np.frombuffer(os.urandom(64 * 2**20), np.uint16) & 0xBFFF  # no infinities, no NaN

    def random(*shape):
        return np.resize(tile, np.prod(shape)).reshape(shape).view(ml_dtypes.bfloat16)

    def layer(start):
        kv = KV_HEADS * HEAD_DIM
        return {
            start + "self_attn.q_proj.weight": random(HEADS * HEAD_DIM, EMBED),
            start + "self_attn.q_proj.bias": random(HEADS * HEAD_DIM),
            start + "self_attn.k_proj.weight": random(kv, EMBED),
            start + "self_attn.k_proj.bias": random(kv),
            start + "self_attn.v_proj.weight": random(kv, EMBED),
            start + "self_attn.v_proj.bias": random(kv),
            start + "self_attn.o_proj.weight": random(EMBED, HEADS * HEAD_DIM),
            start + "mlp.gate_proj.weight": random(MLP, EMBED),
            start + "mlp.up_proj.weight": random(MLP, EMBED),
            start + "mlp.down_proj.weight": random(EMBED, MLP),
            start + "input_layernorm.weight": random(EMBED),
            start + "post_attention_layernorm.weight": random(EMBED),
        }

    weight_map, total, layers = {}, 0, 0
    tensors = {"model.embed_tokens.weight": random(VOCAB, EMBED), "model.norm.weight": random(EMBED)}
    while tensors:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        size = sum(value.nbytes for value in tensors.values())
        while size < 5e8 and total + size < gigabytes * 1e9:
            tensors |= layer(f"model.layers.{layers}.")
            layers += 1
            size = sum(value.nbytes for value in tensors.values())
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += size
        tensors = {} if total >= gigabytes * 1e9 else layer(f"model.layers.{layers}.")
        layers += bool(tensors)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": EMBED, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    os.sync()
    return total


# --- the loaders: folder, number of devices, sharded dimension -> all values ---------------------------------


def sharding_of(devices, dim):
    """Return a function from a shape to its sharding."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def make(shape):
        axes = [None] * len(shape)
        if dim is not None and len(shape) == 2:
            axes[dim] = "x"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return make


def files_by_name(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def plain_read(folder, devices, dim):
    """Read the bytes of the files into new memory and do nothing else."""
    import numpy as np

    contents = []
    for name in sorted(set(files_by_name(folder).values())):
        content = np.empty(os.path.getsize(folder / name), np.uint8)
        with open(folder / name, "rb", buffering=0) as file:
            done = 0
            while done < len(content):
                done += file.readinto(content.data[done : done + 2**24])
        contents.append(content)
    return contents


def qwen_dist(folder, devices, dim):
    import jax

    from qwen_dist.checkpoint.load import load
    from qwen_dist.checkpoint.source import open_checkpoint

    make = sharding_of(devices, dim)
    checkpoint = open_checkpoint(folder)
    target = {
        name.removeprefix("model."): jax.ShapeDtypeStruct(info.shape, info.dtype.numpy, sharding=make(info.shape))
        for name, info in checkpoint.tensors.items()
    }
    return list(load(checkpoint, target, tied=True).values())


def get_slice(folder, devices, dim):
    import jax
    from safetensors import safe_open

    make, arrays = sharding_of(devices, dim), []
    by_file = {}
    for name, file in files_by_name(folder).items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        with safe_open(folder / file, "numpy") as handle:
            for name in names:
                view = handle.get_slice(name)
                shape = tuple(view.get_shape())
                arrays.append(jax.make_array_from_callback(shape, make(shape), lambda index, view=view: view[index]))
    return arrays


def get_tensor(folder, devices, dim):
    import jax
    from safetensors import safe_open

    make, arrays = sharding_of(devices, dim), []
    for file in sorted(set(files_by_name(folder).values())):
        with safe_open(folder / file, "numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                value = handle.get_tensor(name)
                arrays.append(jax.device_put(value, make(value.shape)))
    return arrays


def orbax(folder, devices, dim):
    import jax
    from orbax.checkpoint import v1 as ocp

    make = sharding_of(devices, dim)
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        found = ocp.metadata(folder).metadata
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=make(x.shape)), found)
        return jax.tree.leaves(ocp.load(folder, target))


def safetensors_torch(folder, devices, dim):
    import safetensors.torch

    files = sorted(set(files_by_name(folder).values()))
    return [value for file in files for value in safetensors.torch.load_file(folder / file).values()]


def from_pretrained(folder, devices, dim):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return [value.detach() for value in model.parameters()]


LOADERS = {
    "plain read of the files": plain_read,
    "qwen_dist": qwen_dist,
    "get_slice + make_array_from_callback": get_slice,
    "get_tensor + device_put": get_tensor,
    "orbax SafetensorsLayout": orbax,
    "safetensors.torch": safetensors_torch,
    "transformers.from_pretrained": from_pretrained,
}
ONE_DEVICE_ONLY = {"plain read of the files", "safetensors.torch", "transformers.from_pretrained"}


# --- one run, in a separate process -------------------------------------------------------------------------


def run_once(folder, loader, layout):
    """Load once and print seconds, bytes read and memory."""
    devices, dim = LAYOUTS[layout]
    warm_up(loader, devices)
    Path("/proc/self/clear_refs").write_text("5")
    memory, read = status("VmRSS"), bytes_read()
    start, busy = time.perf_counter(), time.process_time()
    values = LOADERS[loader](folder, devices, dim)
    touch(values)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    found = {"seconds": seconds, "busy": busy, "read": bytes_read() - read, "memory": status("VmHWM") - memory}
    print(json.dumps(found))


def warm_up(loader, devices):
    """Import and initialise what the loader needs, so that only loading is measured."""
    if loader in ("safetensors.torch", "transformers.from_pretrained"):
        import torch

        torch.zeros(1)
        if loader == "transformers.from_pretrained":
            import transformers

            assert transformers.AutoModelForCausalLM and transformers.Qwen2ForCausalLM
        return
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np

    sharded = jax.device_put(np.zeros((8, 8), "float32"), sharding_of(devices, 0)((8, 8)))
    jax.block_until_ready(sharded)
    import ml_dtypes

    import qwen_dist.checkpoint.load

    if loader == "orbax SafetensorsLayout":
        from orbax.checkpoint import v1

        assert v1.load
    assert ml_dtypes and qwen_dist.checkpoint.load.load


def touch(values):
    """Read a byte of every page."""
    import numpy as np

    for value in values:
        if hasattr(value, "addressable_shards"):
            arrays = [np.asarray(shard.data) for shard in value.addressable_shards]
        elif hasattr(value, "untyped_storage"):
            import torch

            arrays = [value.reshape(-1).view(torch.uint8).numpy()]
        else:
            arrays = [value]
        for array in arrays:
            array.reshape(-1).view(np.uint8)[::4096].sum()


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


# --- all runs -----------------------------------------------------------------------------------------------


def drop_from_cache(folder):
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_cache(folder):
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass


def back_memory(nbytes):
    """Make the system have `nbytes` of free memory that is not returned to the host of a virtual machine.

    A virtual machine returns free memory to its host after a while, and the first access to returned memory costs several
    times as much as to memory that another process has just freed. Without this, a loader's time depends on which one ran
    before it.
    """
    code = f"import numpy; numpy.ones({nbytes}, 'uint8')"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_all(folder, repeats, is_cold):
    results = {}
    root = str(Path(__file__).parents[1])
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    for layout in LAYOUTS:
        loaders = [loader for loader in LOADERS if layout == "1 device" or loader not in ONE_DEVICE_ONLY]
        for _ in range(repeats):
            for loader in loaders:
                if is_cold:
                    drop_from_cache(folder)
                else:
                    warm_cache(folder)
                back_memory(3 * nbytes // 2)
                command = [sys.executable, __file__, "--folder", folder, "--run", loader, layout]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    print(f"{loader}, {layout}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                    continue
                run = json.loads(done.stdout.splitlines()[-1])
                results.setdefault((layout, loader), []).append(run)
                print(f"{layout}, {loader}: {run['seconds']:.2f} s", file=sys.stderr, flush=True)
    return results


def print_table(results, nbytes, cache):
    packages = ("jax", "safetensors", "orbax-checkpoint", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        f"{nbytes / 1e9:.2f} GB, {cache} page cache, {os.cpu_count()} cores, Python {sys.version.split()[0]}, {versions}\n"
    )
    print("| placement | loader | seconds | GB/s | CPU seconds | GB read | memory beyond the arrays, MB |")
    print("|---|---|---|---|---|---|---|")
    for (layout, loader), runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "busy", "read", "memory")}
        cells = [
            f"{median['seconds']:.2f}",
            f"{nbytes / median['seconds'] / 1e9:.2f}",
            f"{median['busy']:.2f}",
            f"{median['read'] / 1e9:.2f}",
            f"{(median['memory'] - nbytes) / 1e6:.0f}",
        ]
        print("| " + " | ".join([layout, loader, *cells]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint to make")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each loader")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every run")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint (default: a temporary folder)")
    parser.add_argument("--run", nargs=2, metavar=("LOADER", "PLACEMENT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_once(args.folder, *args.run)
        return
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=args.folder))
    try:
        nbytes = make_checkpoint(folder, args.gigabytes)
        print_table(run_all(folder, args.repeats, args.cold), nbytes, "cold" if args.cold else "warm")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
