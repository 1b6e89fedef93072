"""Several real processes compute the same numbers as one, and all end when one of them ends."""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).with_name("worker.py")
# The recurrence of the hybrid's delta net is sharded by heads over tensor and context.
MESHES = {"qwen3": "fsdp=4,tensor=2", "qwen3_next": "context=2,expert=2,tensor=2"}
TWO_NETWORKS = "data=dcn{processes},fsdp=-1,tensor=2"
SLOW_HYBRID = pytest.param("qwen3_next", marks=pytest.mark.slow)
BOUND = 1e-12


def run_worker(start, directory, output, port, processes, meshes):
    """Return the arrays that `processes` processes, with eight devices in total, compute on each mesh."""
    started = [
        start(
            [sys.executable, WORKER, directory, output, *meshes],
            JAX_NUM_CPU_DEVICES=str(8 // processes),
            **({} if processes == 1 else variables(port, processes, number)),
        )
        for number in range(processes)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    with np.load(output) as file:
        return dict(file)


def variables(port, processes, number):
    values = {"COORDINATOR": f"127.0.0.1:{port}", "NUM_PROCESSES": str(processes), "PROCESS_ID": str(number)}
    return {f"QWEN_DIST_{key}": value for key, value in values.items()}


@pytest.fixture
def mesh(family):
    return MESHES[family]


@pytest.fixture
def one_process(start, directory, family, mesh, tmp_path, port, _kept={}):  # noqa: B006 (computed once for all tests)
    """What one process computes on one device and on `mesh`."""
    if family not in _kept:
        _kept[family] = run_worker(start, directory, tmp_path / "one.npz", port, 1, ("data=1", mesh))
    return _kept[family]


def assert_equal(found, expected, meshes, of):
    names = [key.removeprefix(f"{of} ") for key in expected if key.startswith(f"{of} ")]
    assert len(names) > 10 and "logits" in names
    for mesh in meshes:
        for name in names:
            ours, theirs = found[f"{mesh} {name}"], expected[f"{of} {name}"]
            assert ours.dtype == theirs.dtype
            if name == "tokens":
                np.testing.assert_array_equal(ours, theirs)
            else:
                scale = np.abs(theirs).max()
                assert scale > 0 and np.abs(ours - theirs).max() <= BOUND * max(1, scale), (mesh, name)


@pytest.mark.parametrize("family", ["qwen3", SLOW_HYBRID], indirect=True)
def test_eight_devices_of_one_process_match_one_device(one_process, mesh):
    assert_equal(one_process, one_process, (mesh,), "data=1")
    assert len(np.unique(one_process["data=1 tokens"])) > 8


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("family", ["qwen3", SLOW_HYBRID], indirect=True)
def test_several_processes_match_one_process(start, directory, one_process, mesh, tmp_path, port, processes):
    meshes = (mesh, TWO_NETWORKS.format(processes=processes))
    found = run_worker(start, directory, tmp_path / "several.npz", port, processes, meshes)
    assert_equal(found, one_process, meshes, "data=1")
    assert_equal(found, one_process, meshes[:1], mesh)


# --- batch ---


def write_input(path, count, max_new_tokens):
    lines = [json.dumps({"id": i, "prompt": "the fox " * (i % 5), "max_new_tokens": max_new_tokens}) for i in range(count)]
    path.write_text("\n".join([*lines, "no JSON", ""]))
    return path


def batch(directory, input, output, *flags):
    paths = ["--model", str(directory), "--input", str(input), "--output", str(output)]
    return ["batch", *paths, "--dtype", "float32", "--json", *flags]


@pytest.fixture
def alone(qwen_dist, directory, tmp_path):
    """The results of one process with one device."""
    input = write_input(tmp_path / "in.jsonl", 9, 5)
    process = qwen_dist(batch(directory, input, tmp_path / "alone.jsonl", "--num-cpu-devices", "1"))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return sorted((tmp_path / "alone.jsonl").read_text().splitlines()), json.loads(out)


@pytest.mark.parametrize(
    ("family", "processes", "flags"),
    [
        ("qwen3", 2, ["--mesh", "fsdp=2,tensor=2"]),
        pytest.param("qwen3", 4, ["--num-replicas", "2", "--mesh", "tensor=4"], marks=pytest.mark.slow),
        pytest.param("qwen3", 3, ["--num-replicas", "3"], marks=pytest.mark.slow),
        pytest.param("qwen3_next", 2, ["--mesh", "expert=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("qwen3_next", 4, ["--num-replicas", "2", "--mesh", "context=2,tensor=2"], marks=pytest.mark.slow),
    ],
    indirect=["family"],
)
def test_every_record_is_answered_once(start, launch, directory, tmp_path, alone, processes, flags):
    lines, counts = alone
    output = tmp_path / "out.jsonl"
    command = [launch / "local.sh", "--processes", processes, "--devices", "2", "--logs", tmp_path / "logs", "--"]
    process = start([*command, *batch(directory, tmp_path / "in.jsonl", output, *flags)])
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert sorted(output.read_text().splitlines()) == lines
    printed = json.loads(out)
    assert {key: value for key, value in printed.items() if key not in ("seconds", "output")} == {
        key: value for key, value in counts.items() if key not in ("seconds", "output")
    }


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def processes_of(marker):
    """Return {QWEN_DIST_PROCESS_ID: pid} of the running programs that have `marker` among their arguments."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if any(marker in argument for argument in arguments) and b"python" in arguments[0]:
                values = dict(item.partition(b"=")[::2] for item in (entry / "environ").read_bytes().split(b"\0"))
                found[int(values[b"QWEN_DIST_PROCESS_ID"])] = int(entry.name)
    return found


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_all_and_is_named(start, launch, directory, tmp_path, victim, how):
    input, output = write_input(tmp_path / "in.jsonl", 500, 100), tmp_path / "out.jsonl"
    command = [launch / "local.sh", "--processes", "3", "--devices", "1", "--logs", tmp_path / "logs", "--"]
    process = start([*command, *batch(directory, input, output)])
    marker = os.fsencode(output)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size):  # results arrive: all processes are at work
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    pids = processes_of(marker)
    assert sorted(pids) == [0, 1, 2]
    os.kill(pids[victim], how)
    killed_at = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 60
    assert process.returncode == 128 + how
    assert processes_of(marker) == {}
    for number in {0, 1, 2} - {victim}:
        assert f"process {number} on" in errors
        log = (tmp_path / "logs" / f"{number}.log").read_text()
        assert f"stops: process {victim} on " in log and f"(pid {pids[victim]}) is gone" in log
    for line in output.read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
def test_repeated_kills_answer_every_record_once(start, launch, directory, tmp_path, qwen_dist):
    """Four processes in two replicas; a random one is killed at a random moment, and the same command resumes the batch."""
    count, kills, rng = 1000, 20, random.Random(4)
    input, output = write_input(tmp_path / "in.jsonl", count, 40), tmp_path / "out.jsonl"
    process = qwen_dist(batch(directory, input, tmp_path / "alone.jsonl", "--num-cpu-devices", "1"))
    assert process.wait(timeout=120) == 0, process.communicate()
    undisturbed = sorted((tmp_path / "alone.jsonl").read_text().splitlines())
    assert len(undisturbed) == count + 1
    size = size_of(tmp_path / "alone.jsonl")
    most = size * 3 // 4  # beyond that, a run on a busy machine may end before it is killed
    command = [launch / "local.sh", "--processes", "4", "--devices", "1", "--logs", tmp_path / "logs", "--"]
    command += batch(directory, input, output, "--num-replicas", "2", "--mesh", "tensor=2", "--max-batch-size", "4")
    victims, sizes = [], []
    for kill in range(kills):
        # Wait until each run has written something: a kill before the rendezvous costs the launcher's one-minute wait.
        wanted = max(size_of(output), rng.randrange(most * kill // kills, most * (kill + 1) // kills))
        process, deadline = start(command), time.monotonic() + 120
        pids: dict[int, int] = {}
        while process.poll() is None and not (len(pids) == 4 and size_of(output) > wanted):
            assert time.monotonic() < deadline
            time.sleep(0.005)
            if len(pids) < 4:  # the search is slow, so it stops once all four are found
                pids = processes_of(os.fsencode(output))
        assert process.poll() is None
        victims.append(rng.choice(sorted(pids)))
        os.kill(pids[victims[-1]], signal.SIGKILL)
        sizes.append(size_of(output))
        printed = process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGKILL, printed
        assert processes_of(os.fsencode(output)) == {}
    process = start(command)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sorted(output.read_text().splitlines()) == undisturbed
    counts = json.loads(out)
    assert counts["num_before"] + counts["num_answered"] + counts["num_errors"] == count + 1
    print(f"processes {victims} of 4 killed with {sizes} of {size} bytes written: {count + 1} records, each once")


def test_a_failing_process_ends_all_and_is_named(start, launch, directory, tmp_path):
    """Process 0 alone opens the output, which already holds results, and fails."""
    input, output = write_input(tmp_path / "in.jsonl", 3, 3), tmp_path / "out.jsonl"
    output.write_text("{}\n")
    command = [launch / "local.sh", "--processes", "2", "--devices", "1", "--logs", tmp_path / "logs", "--"]
    process = start([*command, *batch(directory, input, output)])
    process.communicate(timeout=100)
    assert process.returncode == 1
    for number in (0, 1):
        log = (tmp_path / "logs" / f"{number}.log").read_text()
        assert f"process {number} on" in log and "holds results already, and there is no journal" in log
        assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize("family", MESHES, indirect=True)
def test_generate_prints_once(start, launch, directory, tmp_path):
    command = [launch / "local.sh", "--processes", "2", "--devices", "2", "--logs", tmp_path / "logs", "--"]
    flags = ["--model", str(directory), "--dtype", "float32", "--prompt", "the fox", "--max-new-tokens", "6", "--json"]
    process = start([*command, "generate", *flags])
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(json.loads(out)["token_ids"]) == 6
