"""What the preflight says: real processes and sockets, and every failure within the time that was given."""

import copy
import shutil
import socket
import subprocess
import sys
import time

import pytest

import qwen_dist as package
from qwen_dist.hosts import preflight
from qwen_dist.hosts.cluster import Cluster

HOST = socket.gethostname()
CLUSTER = Cluster("host-a:8482", 2, 0, "the flags")
SECONDS = 4


def finished(processes):
    """(exit code, standard error) of each, in less time than the preflight may take."""
    ended = []
    for process in processes:
        _, errors = process.communicate(timeout=60)
        ended.append((process.returncode, errors))
    return ended


@pytest.fixture
def preflights(qwen_dist, port):
    """A function that starts the given processes of `count` with a short time limit, and waits for their ends."""

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


def test_a_host_that_is_missing_is_named_to_those_that_came(preflights, port):
    ended = preflights([0, 1], 4)
    assert_all_say(ended, f"processes 2, 3 of 4 did not come to {HOST} (127.0.0.1:{port}) within {SECONDS} s")
    assert_all_say(ended, f"127.0.0.1 is a loopback address, which only processes on {HOST} itself can reach")


def test_nobody_listens_on_a_loopback_coordinator(preflights, port):
    ended = preflights([1], 2)
    assert_all_say(ended, f"process 1 on {HOST} cannot reach process 0 at 127.0.0.1:{port} within {SECONDS} s")
    assert_all_say(ended, "127.0.0.1 is a loopback address, and on this host nothing listens there")


def test_a_name_that_is_none(preflights):
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


def test_a_blocked_port(preflights, own_name, port):
    """A queue that is full makes the system drop whatever else comes, as a firewall does."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("", port))
        full.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex((own_name, port))
        ended = preflights([1], 2, host=own_name)
    assert_all_say(ended, f"{own_name}:{port}", f"no answer; a firewall drops port {port}, or the host is down")


def test_a_port_in_use(preflights, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert_all_say(preflights([0], 2), f"process 0 on {HOST} cannot listen on port {port}: Address already in use")


def test_one_number_twice(preflights):
    ended = preflights([0, 1, 1], 3)
    assert_all_say(ended, f"{HOST} and {HOST} both say that they are process 1 of 3")


def test_different_checkpoints_and_settings(preflights, directory, tmp_path):
    """Two hosts with a directory of the same name; one number in the middle of the weights differs."""
    for host in ("a", "b"):
        shutil.copytree(directory, tmp_path / host / "model")
    weights = tmp_path / "b" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    each = [{"cwd": tmp_path / "a"}, {"cwd": tmp_path / "b"}]
    ended = preflights([0, 1], 2, flags=("--model", "model"), each=each)
    assert_all_say(ended, f"process 1 on {HOST} (pid ", "sees another checkpoint (", "copy the same files to all hosts")


def test_different_code(preflights, tmp_path):
    shutil.copytree(package.__path__[0], tmp_path / "qwen_dist")
    with open(tmp_path / "qwen_dist" / "errors.py", "a") as file:
        file.write("# one line more\n")
    ended = preflights([0, 1], 2, each=[{}, {"cwd": tmp_path}])
    assert_all_say(ended, "has other code of qwen-dist (", "install the same commit on all hosts")


def test_a_loopback_coordinator_and_two_hosts(start, port):
    """The second process has a host name of its own, as on another host behind a tunnel."""
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


def test_all_is_well(qwen_dist, port):
    flags = ("preflight", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--num-cpu-devices", "2")
    processes = [qwen_dist([*flags, "--mesh", "fsdp=dcn2*ici2", "--process-id", str(number)]) for number in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "fsdp 4: weights by embed; activations by embed" in outputs[0][0]
    assert outputs[0][0].endswith("all 2 processes and 4 devices respond\n")
    assert outputs[1][0] == ""


# --- the judgement, on facts of this machine with one thing changed ---


@pytest.fixture(scope="module")
def facts():
    found = preflight.gather({"mesh": ""}, checkpoint="", input=None, disk=["~"], weights_in_memory=0)
    return found | {"memory": {"free": 8 * 10**9, "needed": 10**9}, "disk": {"~": 10**12}}


def judged(facts, **changes):
    other = copy.deepcopy(facts) | {"host": "host-b"} | changes
    return preflight.judge(CLUSTER, {0: facts | {"host": "host-a"}, 1: other})


def test_alike(facts):
    assert judged(facts) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"versions": {"qwen-dist": "0.0.1", "jax": "0.1"}}, "has jax 0.1 and process 0 on host-a"),
        ({"settings": {"mesh": "'tensor=2'"}}, "was started with mesh='tensor=2' and process 0 on host-a"),
        ({"input": "0123"}, "sees another input file than process 0 on host-a"),
        ({"disk": {"/data": 5 * 10**8}}, "has 0.5 GB free in /data, and 1.0 GB may be needed: make room."),
        (
            {"memory": {"free": 10**9, "needed": 3 * 10**9}},
            "host-b has 1.0 GB of free memory and its processes need at least 3.0 GB",
        ),
    ],
)
def test_judgement(facts, changes, sentence):
    assert any(sentence in problem and "host-b" in problem for problem in judged(facts, **changes))


def test_processes_of_one_host_share_its_memory(facts):
    nine = {process: facts | {"host": "host-a"} for process in range(9)}
    assert preflight.judge(CLUSTER, nine) == [
        "host-a has 8.0 GB of free memory and its processes need at least 9.0 GB: use more hosts, or end other programs."
    ]
