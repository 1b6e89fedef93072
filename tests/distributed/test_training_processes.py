"""Training on several processes: the same batches and losses as on one, also when resumed, on any number of them."""

import json
import os
import shutil

import numpy as np
import pytest

ARGUMENTS = "--dtype float32 --batch-size 4 --mesh fsdp=-1 --config.data.max_length=64 --config.lora.rank=4"
ARGUMENTS = f"{ARGUMENTS} --config.optimizer.schedule=constant".split()
DEVICES = 4


def train(start, launch, directory, chats, output, processes, steps):
    """Train, or resume, on four devices in `processes` processes; return output, log and the metrics of every step."""
    command = [launch / "local.sh", "--processes", processes, "--devices", DEVICES // processes, "--logs", output / "logs"]
    command += ["--", "finetune", "--model", directory, "--data", chats, "--output", output / "run", "--steps", steps]
    (output / "run").parent.mkdir(exist_ok=True)
    process = start([*command, *ARGUMENTS])
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    said = (output / "logs" / "0.log").read_text()
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return out, said, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "numbers"),
    [("qwen3", (2, 1)), ("qwen3", (1, 2, 4, 2, 1)), ("qwen3_next", (2, 1))],
    ids=str,
    indirect=["family"],
)
def test_resume_on_any_number_of_processes(start, launch, directory, chats, tmp_path, numbers):
    last = 2 * len(numbers)
    _, _, alone = train(start, launch, directory, chats, tmp_path / "one", 1, last)
    for index, processes in enumerate(numbers):
        out, _, several = train(start, launch, directory, chats, tmp_path / "several", processes, 2 * (index + 1))
    result = tmp_path / "several" / "run" / "adapter"
    assert out.splitlines() == [f"{last} steps, loss {several[-1]['loss']:.4f}: {result}"]
    assert [entry["step"] for entry in several] == list(range(1, last + 1))
    assert [entry["num_tokens"] for entry in several] == [entry["num_tokens"] for entry in alone], "the same batches"
    losses = np.array([[entry["loss"] for entry in entries] for entries in (alone, several)])
    print(f"processes {numbers}, two steps each: losses differ by {np.ptp(losses, axis=0).max():.1e} at most")
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_left_out_by_every_process(start, launch, directory, chats, tmp_path):
    run = tmp_path / "several" / "run"

    def go_on(steps):
        return train(start, launch, directory, chats, tmp_path / "several", 2, steps)[1:]

    go_on(2)
    _, whole = go_on(4)
    saved = tmp_path / "saved"
    shutil.copytree(run, saved)
    checkpoint = run / "checkpoints" / "4"
    for damage in ("cut arrays", "no position", "state of another step"):
        shutil.rmtree(run)
        shutil.copytree(saved, run)
        if damage == "cut arrays":
            for path in checkpoint.glob("state/**/d/*"):
                os.truncate(path, path.stat().st_size // 2)
        elif damage == "no position":
            (checkpoint / "position" / "metadata").write_text("")
        else:
            shutil.rmtree(checkpoint)
            shutil.copytree(run / "checkpoints" / "2", checkpoint)
        said, again = go_on(4)
        reason = "has the state after step 2" if damage == "state of another step" else "cannot be restored"
        assert f"the checkpoint {run}/checkpoints/4 {reason}" in said, said
        assert "resuming after step 2 of 4" in said and "Traceback" not in said
        assert (run / "damaged-checkpoint-4").is_dir()
        assert sorted(os.listdir(run / "checkpoints")) == ["2", "4"]
        assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]
