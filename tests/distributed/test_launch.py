"""The launchers: the exact commands they would run, and manifests that pass Kubernetes' own types."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml

ARGUMENTS = ["batch", "--model", "/data/a b", "--input", 'q"uo\\te$(X).jsonl', "--output", "out.jsonl"]
ODD = [
    "costs $$5",
    "$$(HOME)",
    "$$$",
    "${NODES}${ARGUMENTS}",
    "& \\0 \\n",
    "*",
    "'",
    "\r\n\t\x1b[2J\x7f\x9b\u2028\ufeffü😀",
    "",
]
GKE = ["--image", "registry/image:1", "--nodes", "4", "--chips", "4", "--name", "run"]


def expand(word):
    """Replace what Kubernetes replaces in an argument, where no variable is set."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda match: "$" if match[0] == "$$" else match[0], word)


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

    text = output_of([launch / "gke" / "launch.sh", "--kind", kind, *flags, *GKE, "--dry-run", "--", *ARGUMENTS, *ODD])
    manifest = yaml.safe_load(text)
    parsed = JobsetV1alpha2JobSet.from_dict(manifest)  # raises for wrong types and drops unknown keys
    assert parsed.to_dict() == manifest
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert [expand(word) for word in container["args"]] == [*ARGUMENTS, *ODD]
    assert job["replicas"] == (2 if kind == "tpu" else 1) and job["template"]["spec"]["parallelism"] == 4


LOCAL, SLURM, POD = ["local.sh"], ["slurm.sh"], ["tpu_pod.sh", "--name", "p", "--zone", "z"]
TPU = ["gke/launch.sh", "--kind", "tpu", "--accelerator", "a", "--topology", "4x4", *GKE]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*LOCAL, "--processes", "0"], "--processes must be a whole number of at least 1; got 0"),
        ([*LOCAL, "--processes", "two"], "--processes must be a whole number"),
        ([*LOCAL, "--processes", "a[$(touch made)]"], "--processes must be a whole number"),
        ([*LOCAL, "--devices", "-1"], "--devices must be a whole number"),
        ([*LOCAL, "--port", "70000"], "--port must be at most 65535; got 70000"),
        ([*LOCAL, "--logs", ""], "--logs needs a value"),
        ([*LOCAL, "--unknown", "1"], "usage: "),
        ([*SLURM, "--nodes", "1-2"], "--nodes must be a whole number"),
        ([*SLURM, "--nodes", "2", "--gpus-per-node", "x"], "--gpus-per-node must be a whole number"),
        (SLURM, "usage: "),
        ([*TPU, "--nodes", "x"], "--nodes must be a whole number"),
        ([*TPU, "--chips", "0"], "--chips must be a whole number"),
        ([*TPU, "--slices", "1.5"], "--slices must be a whole number"),
        ([*TPU, "--name", "Run_1"], "--name must have at most 40 lower-case letters"),
        ([*TPU, "--image", "a\nb: c"], "--image may have letters, digits"),
        ([*TPU, "--topology", "${NODES}"], "--topology may have letters, digits"),
        ([*TPU, "--kind", "cpu"], "launch/gke/launch.sh --kind tpu"),
    ],
)
def test_wrong_flags(launch, tmp_path, command, message):
    script, *flags = command
    done = subprocess.run(
        [launch / script, *flags, "--dry-run", "--", "batch"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[*LOCAL, "--port"], [*SLURM, "--nodes"], [*POD, "--logs"], [*TPU, "--image"]])
def test_a_flag_without_a_value(launch, command):
    done = subprocess.run([launch / command[0], *command[1:]], capture_output=True, text=True)
    assert done.returncode == 2 and f"{command[-1]} needs a value" in done.stderr
