"""Preflight errors, with real processes and sockets: every failure is reported within the timeout."""

import copy
import shutil
import socket
import subprocess
import sys
import time

import pytest

import qwen_dist as package
from qwen_dist.runtime import preflight
from qwen_dist.runtime.cluster import Cluster

HOST = socket.gethostname()
CLUSTER = Cluster("host-a:8482", 2, 0, "the flags")
SECONDS = 4


def finished(processes):
    """Return (exit code, standard error) of each process."""
    ended = []
    for process in processes:
        _, errors = process.communicate(timeout=60)
        ended.append((process.returncode, errors))
    return ended


@pytest.fixture
def preflights(qwen_dist, port):
    """A function that starts the given processes of `count` with a short timeout, and waits until they end."""

    def run(numbers, count, host="127.0.0.1", flags=(), each=None, **options):
        start = time.monotonic()
        processes = [
            qwen_dist(
                [
                    *("preflight", "--coordinator", f"{host}:{port}", "--num-processes", str(count)),
                    *("--process-id", str(number), "--start-timeout", str(SECONDS), *flags),
                ],
                **options,
                **(each[index] if each else {}),
            )
            for index, number in enumerate(numbers)
        ]
        ended = finished(processes)
        assert time.monotonic() - start < 60
        return ended

    return run


def assert_all_say(ended, *texts):
    for code, errors in ended:
        assert code == 1
        for text in texts:
            assert text in errors
        assert "Traceback" not in errors


def test_missing_processes_are_named(preflights, port):
    ended = preflights([0, 1], 4)
    assert_all_say(ended, f"processes 2, 3 of 4 did not connect to {HOST} (127.0.0.1:{port}) within {SECONDS} s")
    assert_all_say(ended, f"127.0.0.1 is a loopback address, which only processes on {HOST} itself can reach")


def test_loopback_coordinator_that_does_not_listen(preflights, port):
    ended = preflights([1], 2)
    assert_all_say(ended, f"process 1 on {HOST} cannot reach process 0 at 127.0.0.1:{port} within {SECONDS} s")
    assert_all_say(ended, "127.0.0.1 is a loopback address, and on this host nothing listens there")


def test_unknown_host_name(preflights):
    assert_all_say(preflights([1], 2, host="nowhere.invalid"), "the name nowhere.invalid cannot be resolved")


@pytest.fixture
def own_name():
    try:
        socket.gethostbyname(HOST)
    except socket.gaierror:
        pytest.skip("this machine's name cannot be resolved")
    return HOST


def test_refused(preflights, own_name, port):
    ended = preflights([1], 2, host=own_name)
    assert_all_say(
        ended, f"{own_name}:{port}", f"refused; process 0 is not running there, or a firewall rejects port {port}"
    )


def test_blocked_port(preflights, own_name, port):
    """When the listen queue is full the kernel drops further connections, as a firewall does."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("", port))
        full.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex((own_name, port))
        ended = preflights([1], 2, host=own_name)
    assert_all_say(ended, f"{own_name}:{port}", f"no answer; a firewall drops port {port}, or the host is down")


def test_port_in_use(preflights, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert_all_say(preflights([0], 2), f"process 0 on {HOST} cannot listen on port {port}: Address already in use")


def test_duplicate_process_id(preflights):
    ended = preflights([0, 1, 1], 3)
    assert_all_say(ended, f"{HOST} and {HOST} both have process id 1 of 3")


def test_different_checkpoints_and_settings(preflights, directory, tmp_path):
    """Two hosts with directories of the same name; one byte of the weights differs."""
    for host in ("a", "b"):
        shutil.copytree(directory, tmp_path / host / "model")
    weights = tmp_path / "b" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    each = [{"cwd": tmp_path / "a"}, {"cwd": tmp_path / "b"}]
    ended = preflights([0, 1], 2, flags=("--model", "model"), each=each)
    assert_all_say(ended, f"process 1 on {HOST} (pid ", "sees a different checkpoint (", "copy the same files to all hosts")


def test_different_code(preflights, tmp_path):
    shutil.copytree(package.__path__[0], tmp_path / "qwen_dist")
    with open(tmp_path / "qwen_dist" / "errors.py", "a") as file:
        file.write("# one line more\n")
    ended = preflights([0, 1], 2, each=[{}, {"cwd": tmp_path}])
    assert_all_say(ended, "has different qwen-dist code (", "install the same commit on all hosts")


def test_loopback_coordinator_with_two_hosts(start, port):
    """The second process has a different host name, as on another host behind a tunnel."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have its own host name")
    command = f"{sys.executable} -m qwen_dist.cli preflight --coordinator 127.0.0.1:{port} --num-processes 2 --process-id"
    processes = [
        start(["sh", "-c", f"exec {command} 0"]),
        start(["unshare", "--uts", "sh", "-c", f"hostname other-host && exec {command} 1"]),
    ]
    sentence = f"the coordinator 127.0.0.1:{port} is a loopback address and the processes are on 2 hosts ("
    assert_all_say(finished(processes), sentence, "other-host")


def test_different_numbers_of_devices(preflights):
    ended = preflights([0, 1], 2, each=[{"JAX_NUM_CPU_DEVICES": "2"}, {"JAX_NUM_CPU_DEVICES": "1"}])
    assert_all_say(
        ended, f"process 1 on {HOST} (pid ", "has 1 cpu devices", "has 2: every process must have the same number"
    )


def test_preflight_passes(qwen_dist, port):
    flags = ("preflight", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--num-cpu-devices", "2")
    processes = [qwen_dist([*flags, "--mesh", "fsdp=dcn2*ici2", "--process-id", str(number)]) for number in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "fsdp 4: weights by embed; activations by embed" in outputs[0][0]
    assert outputs[0][0].endswith("all 2 processes and 4 devices respond\n")
    assert outputs[1][0] == ""


@pytest.mark.parametrize("family", ["qwen3_next"], indirect=True)
def test_preflight_of_a_hybrid_by_the_launcher(start, launch, directory, tmp_path):
    command = [launch / "local.sh", "--processes", "2", "--devices", "2", "--logs", tmp_path / "logs", "--"]
    process = start([*command, "preflight", "--model", directory, "--mesh", "expert=2,tensor=2"])
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "tensor 2: weights by" in out and out.endswith("all 2 processes and 4 devices respond\n")


# --- find_problems, on the host info of this machine with one change ---


@pytest.fixture(scope="module")
def host_info():
    found = preflight.collect_host_info(
        {"mesh": ""}, checkpoint="", inputs=(), write_dirs=["~"], memory_per_checkpoint_byte=0
    )
    return found | {"memory": {"free": 8 * 10**9, "needed": 10**9}, "disk": {"~": 10**12}}


def problems_with(host_info, **changes):
    other = copy.deepcopy(host_info) | {"host": "host-b"} | changes
    return preflight.find_problems(CLUSTER, {0: host_info | {"host": "host-a"}, 1: other})


def test_equal_hosts(host_info):
    assert problems_with(host_info) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"versions": {"qwen-dist": "0.0.1", "jax": "0.1"}}, "has jax 0.1 and process 0 on host-a"),
        ({"settings": {"mesh": "'tensor=2'"}}, "was started with mesh='tensor=2' and process 0 on host-a"),
        ({"input": "0123"}, "sees other input files than process 0 on host-a"),
        ({"disk": {"/data": 5 * 10**8}}, "has 0.5 GB free in /data, and 1.0 GB may be needed: free some disk space."),
        (
            {"memory": {"free": 10**9, "needed": 3 * 10**9}},
            "host-b has 1.0 GB of free memory and its processes need at least 3.0 GB",
        ),
    ],
)
def test_different_hosts(host_info, changes, sentence):
    assert any(sentence in problem and "host-b" in problem for problem in problems_with(host_info, **changes))


def test_processes_of_one_host_share_its_memory(host_info):
    nine = {process: host_info | {"host": "host-a"} for process in range(9)}
    assert preflight.find_problems(CLUSTER, nine) == [
        "host-a has 8.0 GB of free memory and its processes need at least 9.0 GB: use more hosts, or end other programs."
    ]
