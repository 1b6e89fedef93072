"""Detection of the cluster from flags and from the environment variables that each kind of cluster sets."""

import pytest

from qwen_dist.errors import UsageError
from qwen_dist.runtime.cluster import Cluster, detect_cluster, is_loopback

GKE = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc,a-2.svc,a-3.svc", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}


def detected(environment, *flags):
    cluster = detect_cluster(*(flags or (None, None, None)), environment)
    return cluster and (cluster.coordinator, cluster.num_processes, cluster.process_id, cluster.local_device_ids)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (GKE, ("a-0.svc:8482", 4, 2, None)),
        (GKE | SLICES, ("run-slice-0-0.run:8482", 8, 6, None)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (SLURM, ("gpu007:61444", 4, 3, None)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("gpu007:61444", 4, 3, (1,))),
        (
            SLURM | {"SLURM_STEP_NODELIST": "login1,gpu3", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            ("login1:61444", 2, 0, None),
        ),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({key: value for key, value in SLURM.items() if key != "SLURM_PROCID"}, None),
        (SLURM | {"SLURM_STEP_ID": "batch"}, None),
        (
            {"QWEN_DIST_COORDINATOR": "h:1", "QWEN_DIST_NUM_PROCESSES": "2", "QWEN_DIST_PROCESS_ID": "1"} | GKE,
            ("h:1", 2, 1, None),
        ),
    ],
)
def test_environment_variables(environment, expected):
    assert detected(environment) == expected


def test_flags_take_precedence():
    assert detected(GKE, "h:9", 3, 0) == ("h:9", 3, 0, None)
    assert detected(GKE, "h:9", 1, 0) is None


def test_every_problem_with_the_flags_is_listed():
    with pytest.raises(UsageError) as error:
        detect_cluster("nowhere", None, 5, {})
    assert "num-processes is missing; coordinator 'nowhere' is not of the form host:port" in str(error.value)
    with pytest.raises(UsageError, match="process-id 2 must be from 0 to num-processes - 1"):
        detect_cluster("h:1", 2, 2, {})
    with pytest.raises(UsageError, match=r"QWEN_DIST_PROCESS_ID: .*num-processes 'two' is not a number"):
        detect_cluster(
            None,
            None,
            None,
            {"QWEN_DIST_COORDINATOR": "h:1", "QWEN_DIST_NUM_PROCESSES": "two", "QWEN_DIST_PROCESS_ID": "0"},
        )


@pytest.mark.parametrize(
    ("address", "host", "port", "loopback"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80, True),
        ("127.9.9.9:80", "127.9.9.9", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("localhost:80", "localhost", 80, True),
        ("10.0.0.1:80", "10.0.0.1", 80, False),
        ("local:80", "local", 80, False),
    ],
)
def test_addresses(address, host, port, loopback):
    cluster = Cluster(address, 2, 0, "")
    assert (cluster.host, cluster.port, cluster.is_loopback, is_loopback(host)) == (host, port, loopback, loopback)
