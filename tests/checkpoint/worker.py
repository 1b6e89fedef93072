"""One of several processes, for test_processes.py: runs every scenario in order and reports the outcome."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwen_dist.checkpoint import sync
from qwen_dist.checkpoint.load import execute_plan, load, make_load_plan
from qwen_dist.checkpoint.save import export
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.errors import CheckpointError
from qwen_dist.storage import files

SPECS = {"rows": PartitionSpec("x"), "columns": PartitionSpec(None, "x"), "replicated": PartitionSpec()}


def make_target(checkpoint, spec):
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    return {
        name.removeprefix("model."): jax.ShapeDtypeStruct(
            info.shape,
            info.dtype.numpy,
            sharding=NamedSharding(mesh, spec if len(info.shape) == 2 else PartitionSpec()),
        )
        for name, info in checkpoint.tensors.items()
    }


def check(arrays, checkpoint):
    for name, array in arrays.items():
        info = checkpoint.tensors["model." + name]
        expected = np.fromfile(checkpoint.folder.root / info.file, np.uint8)[info.begin : info.end]
        expected = expected.view(info.dtype.numpy).reshape(info.shape)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def load_and_check(folder, kind):
    checkpoint = open_checkpoint(folder / "good")
    target = make_target(checkpoint, SPECS[kind])
    if jax.process_index() % 2:
        target = dict(reversed(target.items()))
    check(load(checkpoint, target), checkpoint)
    plan = make_load_plan(checkpoint, target)
    before = chars_read()
    arrays = execute_plan(plan, checkpoint)
    read = chars_read() - before
    check(arrays, checkpoint)
    return {"planned": plan.bytes_read, "needed": plan.bytes_needed, "read": read}


def chars_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def different_files(folder):
    checkpoint = open_checkpoint(folder / ("good" if jax.process_index() else "other"))
    load(checkpoint, make_target(checkpoint, SPECS["rows"]))


def missing_file(folder):
    open_checkpoint(folder / ("good" if jax.process_index() else "missing"))


def failing_read(folder):
    checkpoint = open_checkpoint(folder / "good")
    if jax.process_index() == 1:
        checkpoint.files["2.safetensors"].path = folder / "nowhere"
    load(checkpoint, make_target(checkpoint, SPECS["rows"]))


def slow_process(folder):
    """Process 1 sleeps; the others report that and wait."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger(sync.__name__).addHandler(handler)
    sync.REPORT_EVERY_S = 0.5
    checkpoint = open_checkpoint(folder / "good")
    if jax.process_index() == 1:
        time.sleep(2)
    check(load(checkpoint, make_target(checkpoint, SPECS["rows"])), checkpoint)
    return {"messages": messages}


def save_and_read_back(folder):
    checkpoint = open_checkpoint(folder / "good")
    arrays = {kind: load(checkpoint, make_target(checkpoint, spec)) for kind, spec in SPECS.items()}
    for kind, loaded in arrays.items():
        export(checkpoint, loaded, folder / f"saved-{kind}", max_shard_bytes=300_000)
        check(load(open_checkpoint(folder / f"saved-{kind}"), make_target(checkpoint, SPECS["columns"])), checkpoint)
    return {}


def save_that_fails_on_one(folder):
    checkpoint = open_checkpoint(folder / "good")
    arrays = load(checkpoint, make_target(checkpoint, SPECS["rows"]))
    export(checkpoint, arrays, folder / "saved-rows", overwrite=jax.process_index() == 1)


def dies_while_loading(folder):
    """Process 1 dies during its reads; the others stop waiting for it after the timeout."""
    sync.TIMEOUT_S = 3.0
    checkpoint = open_checkpoint(folder / "good")
    if jax.process_index() == 1:

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        files.LocalFile.read_into = die
    load(checkpoint, make_target(checkpoint, SPECS["rows"]))


SCENARIOS = {
    "rows": lambda folder: load_and_check(folder, "rows"),
    "columns": lambda folder: load_and_check(folder, "columns"),
    "replicated": lambda folder: load_and_check(folder, "replicated"),
    "different_files": different_files,
    "missing_file": missing_file,
    "failing_read": failing_read,
    "slow_process": slow_process,
    "save_and_read_back": save_and_read_back,
    "save_that_fails_on_one": save_that_fails_on_one,
    "dies_while_loading": dies_while_loading,
}


def main():
    folder, address, processes, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, processes, process)
    sync.TIMEOUT_S = 60.0
    for name, scenario in SCENARIOS.items():
        start = time.monotonic()
        try:
            result = {"result": scenario(folder)}
        except CheckpointError as error:
            result = {"error": str(error)}
        result["seconds"] = time.monotonic() - start
        print(json.dumps({"scenario": name, **result}), flush=True)
    # One process is dead, and an orderly shutdown would wait for it. Process 0 runs the key-value store, so it exits last.
    (folder / f"done-{process}").touch()
    while process == 0 and not all((folder / f"done-{i}").exists() for i in range(2, processes)):
        time.sleep(0.1)
    time.sleep(0.5 if process == 0 else 0)
    os._exit(0)


if __name__ == "__main__":
    main()
