"""Training on several processes: the same batches and losses as on one, also when resumed on a different number of them."""

import json

import numpy as np
import pytest

ARGUMENTS = "--dtype float32 --batch-size 4 --mesh fsdp=-1 --config.data.max_length=64 --config.lora.rank=4"
ARGUMENTS = f"{ARGUMENTS} --config.optimizer.schedule=constant".split()
DEVICES = 4


def train(start, launch, directory, chats, output, processes, steps):
    """Train, or resume, on four devices in `processes` processes; return the output and the metrics of every step."""
    command = [launch / "local.sh", "--processes", processes, "--devices", DEVICES // processes, "--logs", output / "logs"]
    command += ["--", "finetune", "--model", directory, "--data", chats, "--output", output / "run", "--steps", steps]
    (output / "run").parent.mkdir(exist_ok=True)
    process = start([*command, *ARGUMENTS])
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return out, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "numbers"),
    [("qwen3", (2, 1)), ("qwen3", (1, 2, 4, 2, 1)), ("qwen3_next", (2, 1))],
    ids=str,
    indirect=["family"],
)
def test_resume_on_any_number_of_processes(start, launch, directory, chats, tmp_path, numbers):
    last = 2 * len(numbers)
    _, alone = train(start, launch, directory, chats, tmp_path / "one", 1, last)
    for index, processes in enumerate(numbers):
        out, several = train(start, launch, directory, chats, tmp_path / "several", processes, 2 * (index + 1))
    result = tmp_path / "several" / "run" / "adapter"
    assert out.splitlines() == [f"{last} steps, loss {several[-1]['loss']:.4f}: {result}"]
    assert [entry["step"] for entry in several] == list(range(1, last + 1))
    assert [entry["num_tokens"] for entry in several] == [entry["num_tokens"] for entry in alone], "the same batches"
    losses = np.array([[entry["loss"] for entry in entries] for entries in (alone, several)])
    print(f"processes {numbers}, two steps each: losses differ by {np.ptp(losses, axis=0).max():.1e} at most")
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
