"""A batch that is killed at random moments and restarted answers every record exactly once."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

COUNT = 120
SIZES = {
    "qwen3": {"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 10},
    "qwen3_next": {"num_hidden_layers": 2, "num_attention_heads": 8},
}
KILLS = [("qwen3", 2), *(pytest.param(family, 20, marks=pytest.mark.slow) for family in SIZES)]


@pytest.fixture(scope="module")
def family(request):
    """The family of the tiny model; a test may name another."""
    return getattr(request, "param", "qwen3")


@pytest.fixture(scope="module")
def command(tiny_directory, tmp_path_factory, family):
    """A function (output) -> the command line; COUNT records of different lengths, two of them errors."""
    directory = tiny_directory(family, **SIZES[family])
    input = tmp_path_factory.mktemp("killed") / "in.jsonl"
    lines = [{"id": n, "prompt": "the fox " * (n % 7), "max_new_tokens": 5 + 23 * (n % 5)} for n in range(COUNT)]
    lines[11]["top_p"] = 7
    lines[40]["prompt"] = 3
    input.write_text("\n".join(map(json.dumps, lines)) + "\n")
    cache = tmp_path_factory.mktemp("compiled")

    def command(output):
        files = ["--input", str(input), "--output", str(output), "--max-batch-size", "4"]
        run = [sys.executable, "-m", "qwen_dist.cli", "batch", "--model", str(directory), *files, "--dtype", "float32"]
        return ["env", f"JAX_COMPILATION_CACHE_DIR={cache}", *run, "--num-cpu-devices", "1", "--json"]

    return command


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    subprocess.run(command(output), check=True, capture_output=True)
    lines = sorted(output.read_text().splitlines())
    assert len(lines) == COUNT and sum("error" in json.loads(line) for line in lines) == 2
    return lines


def wait_for(path, size: int, process) -> None:
    """Wait until the file has `size` bytes or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("family", "kills"), KILLS, indirect=["family"])
def test_killed_at_random_moments(command, undisturbed, tmp_path, kills):
    output, rng = tmp_path / "out.jsonl", random.Random(kills)
    size = sum(len(line.encode()) + 1 for line in undisturbed)
    num_running, written = 0, []
    for kill in range(kills):
        process = subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(output, rng.randrange(size * kill // kills, size * (kill + 1) // kills), process)
        time.sleep(rng.random() * 0.01)
        num_running += process.poll() is None
        process.kill()
        process.communicate()
        written.append(output.read_bytes().count(b"\n") if output.exists() else 0)
    done = subprocess.run(command(output), check=True, capture_output=True, text=True)
    assert sorted(output.read_text().splitlines()) == undisturbed
    counts = json.loads(done.stdout)
    assert counts["num_before"] + counts["num_answered"] + counts["num_errors"] == COUNT
    print(
        f"killed {kills} times, {num_running} of them while running, after {written} records; "
        f"{COUNT} records, each once and the same as without kills"
    )
    assert num_running >= kills - 1 and len(set(written)) > kills // 2


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_ctrl_c_finishes_running_requests_and_twice_stops_at_once(command, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(output, 200, process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("Traceback")) == (130, 0) and "Ctrl-C again stops at once" in errors
    answered = json.loads(out)["num_answered"]
    lines = output.read_text().splitlines()
    assert 0 < answered < COUNT and set(lines) < set(undisturbed)
    assert not json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["is_complete"]

    process = subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(output, output.stat().st_size + 100, process)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    subprocess.run(command(output), check=True, capture_output=True)
    assert sorted(output.read_text().splitlines()) == undisturbed
