"""The launchers: the exact commands they would run, and manifests that pass Kubernetes' own types."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml

ARGUMENTS = ["batch", "--model", "/data/a b", "--input", 'q"uo\\te$(X).jsonl', "--output", "out.jsonl"]
GKE = ["--image", "registry/image:1", "--nodes", "4", "--chips", "4", "--name", "run"]


def output_of(command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def test_shellcheck_passes(launch):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(launch.rglob("*.sh"))
    assert len(scripts) == 4
    subprocess.run(["shellcheck", *scripts], check=True)


def test_local(launch):
    lines = output_of(
        [launch / "local.sh", "--processes", "3", "--devices", "2", "--dry-run", "--", *ARGUMENTS]
    ).splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines):
        words = shlex.split(line)
        assert f"QWEN_DIST_PROCESS_ID={number}" in words and "JAX_NUM_CPU_DEVICES=2" in words
        start = words.index("qwen-dist") + 1
        assert words[start : start + len(ARGUMENTS)] == ARGUMENTS


def test_slurm(launch):
    command = [
        launch / "slurm.sh",
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--time",
        "1:00:00",
        "--dry-run",
        "--",
        *ARGUMENTS,
    ]
    words = shlex.split(output_of(command))
    assert words[0] == "srun" and {"--ntasks=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--kill-on-bad-exit=1"} < {
        *words
    }
    assert words[words.index("qwen-dist") + 1 :] == ARGUMENTS


def test_tpu_pod(launch):
    """The workers' command, parsed as their shells would, passes the arguments on unchanged."""
    line = output_of([launch / "tpu_pod.sh", "--name", "pod", "--zone", "z", "--dry-run", "run", "--", *ARGUMENTS])
    words = shlex.split(line)
    assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z"] and words[7] == "--worker=all"
    remote = words[8].removeprefix("--command=")
    inner = shlex.split(re.search(r"bash -c (.*) >/dev/null 2>&1 </dev/null", remote)[1])[0]
    assert shlex.split(inner.split("qwen-dist/.venv/bin/qwen-dist ")[1].split(" > ")[0]) == ARGUMENTS


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("tpu", ["--accelerator", "tpu-v6e-slice", "--topology", "4x4", "--slices", "2"]),
        ("gpu", ["--accelerator", "nvidia-h100-80gb"]),
    ],
)
def test_gke(launch, kind, flags):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    text = output_of([launch / "gke" / "launch.sh", "--kind", kind, *flags, *GKE, "--dry-run", "--", *ARGUMENTS])
    assert "${" not in text.replace("$${", "")
    manifest = yaml.safe_load(text)
    parsed = JobsetV1alpha2JobSet.from_dict(manifest)  # raises for wrong types and drops unknown keys
    assert parsed.to_dict() == manifest
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert [word.replace("$$(", "$(") for word in container["args"]] == ARGUMENTS
    assert job["replicas"] == (2 if kind == "tpu" else 1) and job["template"]["spec"]["parallelism"] == 4
