"""Training over several processes: the batches and losses of one, gone on with by another number of them."""

import json

import numpy as np
import pytest

ARGUMENTS = "--dtype float32 --steps 6 --batch-size 4 --mesh fsdp=-1 --config.data.max_length=64 --config.lora.rank=4"
ARGUMENTS = f"{ARGUMENTS} --config.optimizer.schedule=constant".split()


def train(start, launch, directory, chats, output, processes, *more):
    command = [launch / "local.sh", "--processes", processes, "--devices", 2 // processes, "--logs", output / "logs", "--"]
    command += ["finetune", "--model", directory, "--data", chats, "--output", output / "run", *ARGUMENTS, *more]
    (output / "run").parent.mkdir(exist_ok=True)
    process = start(command)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return out, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_as_one(start, launch, directory, chats, tmp_path):
    _, alone = train(start, launch, directory, chats, tmp_path / "one", 1)
    train(start, launch, directory, chats, tmp_path / "two", 2, "--steps", "3")
    out, both = train(start, launch, directory, chats, tmp_path / "two", 1)
    assert out.splitlines() == [f"6 steps, loss {both[-1]['loss']:.4f}: {tmp_path / 'two' / 'run' / 'adapter'}"]
    assert [entry["step"] for entry in both] == [1, 2, 3, 4, 5, 6]
    assert [entry["num_tokens"] for entry in both] == [entry["num_tokens"] for entry in alone], "the same batches"
    np.testing.assert_allclose([e["loss"] for e in both], [e["loss"] for e in alone], rtol=1e-6)
