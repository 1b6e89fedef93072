"""Nothing is lost: what may be replaced or removed, what may be written where, and who writes to an output."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from qwen_dist.cli import main
from qwen_dist.errors import UsageError, UserError
from qwen_dist.outputs import Marker, Written, check_paths, run_lock
from qwen_dist.train.metrics import MetricsLog

DEMO = pathlib.Path(__file__).parents[1] / "qwen_dist" / "demo" / "model"
CHAT = {"messages": [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "Two."}]}


@pytest.fixture
def failed(capsys):
    """Run a command that must fail in one short line; returns its exit code and the line."""

    def failed(*arguments) -> tuple[int, str]:
        code = main(list(map(str, arguments)))
        error = capsys.readouterr().err
        # finetune describes its data before it starts.
        error = error[error.index(f"qwen-dist {arguments[0]}: ") :]
        assert code in (1, 2) and len(error) < 1500 and len(error.splitlines()) == 1, error
        return code, error

    return failed


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "prompt": f"Which is larger, 3 or {n}?"}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(20 * (json.dumps(CHAT) + "\n"))
    return path


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- paths ---


def test_every_conflict_is_listed(tmp_path):
    (tmp_path / "in.jsonl").write_text("1")
    os.link(tmp_path / "in.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("in.jsonl")
    (tmp_path / "run" / "model").mkdir(parents=True)
    read = {"--input": str(tmp_path / "in.jsonl"), "--model": str(tmp_path / "run" / "model")}
    written = [
        Written("--output", str(tmp_path / "hard.jsonl")),
        Written("--chart", str(tmp_path / "soft.jsonl")),
        Written("--profile", str(tmp_path / "run"), is_directory=True),
        Written("--report", str(tmp_path / "none" / "page.html")),
        Written("--more", "s3://bucket/x"),
    ]
    with pytest.raises(UsageError) as error:
        check_paths(read, written)
    message = str(error.value)
    for part in (
        f"--input {tmp_path}/in.jsonl is the same as --output",
        f"--input {tmp_path}/in.jsonl is the same as --chart",
        f"--output {tmp_path}/hard.jsonl and --chart {tmp_path}/soft.jsonl are the same file",
        f"--model {tmp_path}/run/model is inside --profile",
        f"--report {tmp_path}/none/page.html cannot be written: there is no directory {tmp_path}/none",
    ):
        assert part in message
    check_paths({"--input": "s3://bucket/y"}, written[-1:])
    with pytest.raises(UsageError, match="--input s3://bucket/x is the same as --more s3://bucket/x"):
        check_paths({"--input": "s3://bucket/x"}, written[-1:])


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/below", "/", "/proc/x/y", "."])
@pytest.mark.parametrize("verb", ["finetune", "export", "batch"])
def test_places_that_cannot_be_written(failed, tmp_path, prompts, chats, verb, name, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    inputs = {"finetune": ("--data", chats), "export": (), "batch": ("--input", prompts)}[verb]
    before = files_of(tmp_path)
    code, _ = failed(verb, "--model", DEMO, *inputs, "--output", name)
    assert code in (1, 2) and files_of(tmp_path) == before


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "dangling.html").symlink_to(tmp_path / "none" / "page.html")
    (tmp_path / "loop.html").symlink_to("loop.html")
    (tmp_path / "new.html").symlink_to("page.html")
    names = ("dangling.html", "loop.html", "new.html")
    with pytest.raises(UsageError) as error:
        check_paths({}, [Written("--chart", str(tmp_path / name), is_page=True) for name in names])
    message = str(error.value)
    assert f"--chart {tmp_path}/dangling.html cannot be written: there is no directory {tmp_path}/none" in message
    assert f"--chart {tmp_path}/loop.html is a symbolic link that leads to itself" in message and "new.html" not in message


def test_a_marker_that_was_being_written_is_none(tmp_path):
    marker = Marker("made_by.json", "thing", 1)
    assert not marker.check(tmp_path, "--output")
    (tmp_path / "made_by.json.partial").write_text('{"ki')
    assert not marker.check(tmp_path, "--output")
    marker.write(tmp_path)
    assert marker.check(tmp_path, "--output") and os.listdir(tmp_path) == ["made_by.json"]
    with pytest.raises(UsageError, match="is marked as thing, version 1; this is qwen-dist's thing, version 2"):
        Marker("made_by.json", "thing", 2).check(tmp_path, "--output")


# --- batch ---


@pytest.mark.parametrize("role", ["output", "chart", "journal", "manifest", "partial", "lock"])
def test_batch_does_not_write_over_its_input(failed, tmp_path, prompts, role):
    output, chart = tmp_path / "out.jsonl", tmp_path / "chart.html"
    name = {"journal": "out.jsonl.journal", "manifest": "out.jsonl.manifest.json", "partial": "out.jsonl.partial"}
    name |= {"lock": "out.jsonl.lock", "output": "out.jsonl", "chart": "chart.html"}
    shutil.copy(prompts, tmp_path / name[role])
    before = files_of(tmp_path)
    flags = ("--input", tmp_path / name[role], "--output", output, "--chart", chart, "--overwrite")
    code, error = failed("batch", "--model", DEMO, *flags)
    assert code == 2 and ("--input" in error or role == "chart") and files_of(tmp_path) == before


def test_the_lines_of_a_compressed_output_are_not_an_input(failed, tmp_path, prompts):
    input = tmp_path / "w.gz.jsonl"
    shutil.move(prompts, input)
    before = files_of(tmp_path)
    code, error = failed("batch", "--model", DEMO, "--input", input, "--output", tmp_path / "w.gz", "--overwrite")
    assert code == 2 and "--input" in error and files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.jsonl.journal", b"my diary, which is longer than an entry"),
        ("out.jsonl.journal", b"short"),
        ("out.jsonl.manifest.json", b'{"my": "file"}'),
        ("out.jsonl.manifest.json", b"not JSON"),
        ("out.jsonl.lock", b"keys"),
        ("out.jsonl.partial", b"notes"),
        ("out.jsonl.journal.partial", b"notes"),
        ("out.jsonl.manifest.json.partial", b"notes"),
        ("chart.html", b"notes"),
    ],
)
def test_files_of_others_are_not_replaced(failed, tmp_path, prompts, name, content):
    (tmp_path / name).write_bytes(content)
    flags = ("--output", tmp_path / "out.jsonl", "--chart", tmp_path / "chart.html", "--overwrite")
    failed("batch", "--model", DEMO, "--input", prompts, *flags)
    assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    failed("batch", "--model", DEMO, "--input", prompts, *flags)


def test_results_under_the_name_of_the_lines_of_a_compressed_output(failed, tmp_path, prompts):
    work = tmp_path / "w.gz.jsonl"
    work.write_text("my thesis\n")
    code, error = failed("batch", "--model", DEMO, "--input", prompts, "--output", tmp_path / "w.gz", "--overwrite")
    assert code == 1 and str(work) in error and work.read_text() == "my thesis\n"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "w.gz.jsonl"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "out.jsonl"])
def test_results_are_not_written_among_the_files_of_the_model(failed, tmp_path, prompts, name):
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (tmp_path / "link").symlink_to(model / name)
    before = files_of(model)
    for output in (model / name, tmp_path / "link"):
        code, error = failed("batch", "--model", model, "--input", prompts, "--output", output, "--overwrite")
        assert code == 2 and f"--model {model} holds --output {output}" in error and files_of(model) == before


def test_a_damaged_manifest_does_not_end_a_run(tmp_path, prompts, capsys):
    base = (
        "batch",
        "--model",
        DEMO,
        "--input",
        prompts,
        "--output",
        tmp_path / "out.jsonl",
        "--json",
        "--max-new-tokens",
        2,
    )
    assert main(list(map(str, base))) == 0
    manifest = tmp_path / "out.jsonl.manifest.json"
    whole = manifest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes(40)):
        manifest.write_bytes(damaged)
        assert main(list(map(str, base))) == 0
        assert json.loads(manifest.read_text())["counts"]["num_before"] == 40


def test_a_missing_input_is_wrong_usage(failed, tmp_path):
    code, error = failed("batch", "--model", DEMO, "--input", tmp_path / "none", "--output", tmp_path / "out.jsonl")
    assert code == 2 and "--input cannot be read: there is no file" in error and not os.listdir(tmp_path)


def test_changed_settings_are_named(failed, tmp_path, prompts):
    base = ("batch", "--model", DEMO, "--input", prompts, "--output", tmp_path / "out.jsonl", "--json")
    assert main(list(map(str, (*base, "--max-new-tokens", 4)))) == 0
    _, error = failed(*base, "--max-new-tokens", 5, "--temperature", 0.5)
    assert "sampling.max_new_tokens was 4 and is now 5" in error and "sampling.temperature was" in error
    assert "--overwrite" in error


def test_a_second_writer_is_refused(failed, tmp_path, prompts):
    output = tmp_path / "out.jsonl"
    program = f"""
import sys
from qwen_dist.batch.output import OutputFile
with OutputFile({str(output)!r}):
    print("open", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"open\n"
        code, error = failed("batch", "--model", DEMO, "--input", prompts, "--output", output)
        assert code == 1 and f"is in use by process {holder.pid} on " in error
        holder.kill()  # the lock is released with its process
        holder.wait()
        with run_lock(f"{output}.lock", str(output)):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not (tmp_path / "out.jsonl.lock").exists()


# --- finetune ---


def finetune(output, chats, *flags) -> list[str]:
    sizes = ("--steps", 2, "--batch-size", 2, "--config.data.max_length=64", "--config.optimizer.warmup_steps=1")
    sizes += ("--config.save_every=1", "--mesh", "data=1", "--dtype", "float32")
    return list(map(str, ("finetune", "--model", DEMO, "--data", chats, "--output", output, "--json", *sizes, *flags)))


def test_only_a_run_is_replaced(failed, tmp_path, chats, capsys):
    """A run that exists is replaced; its directory's other files stay, and other directories are not touched."""
    foreign = tmp_path / "thesis"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("four years")
    (foreign / "checkpoints" / "one").write_text("x")
    before = files_of(foreign)
    code, error = failed(*finetune(foreign, chats, "--overwrite"))
    assert code == 2 and "nothing in it is changed" in error and files_of(foreign) == before

    run = tmp_path / "run"
    assert main(finetune(run, chats)) == 0
    (run / "notes.txt").write_text("keep me")
    for flags in (("--model", run / "adapter"), ("--adapter", run / "adapter"), ("--data", run / "notes.txt")):
        before = files_of(run)
        code, error = failed(*finetune(run, chats, "--overwrite", *flags))
        assert code == 2 and f"{flags[0]} {flags[1]} is inside --output" in error and files_of(run) == before
    (run / "batch-7.npz").write_text("of a step that failed")
    assert main(finetune(run, chats, "--overwrite")) == 0
    assert (run / "notes.txt").read_text() == "keep me" and not (run / "batch-7.npz").exists()
    marker = run / "qwen_dist_run.json"
    marker.write_text(marker.read_text().replace("1", "2"))
    code, error = failed(*finetune(run, chats, "--overwrite"))
    assert "version 2" in error


@pytest.mark.slow
def test_damaged_checkpoints_and_metrics(tmp_path, chats, capsys):
    """The newest whole checkpoint is taken; without one, a sentence says what to do."""
    run, aside = tmp_path / "run", tmp_path / "aside"
    assert main(finetune(run, chats)) == 0
    result = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.copytree(run, aside)
    (aside / "adapter" / "README.md").write_text("a model card")
    assert main(finetune(aside, chats)) == 0
    assert (aside / "adapter" / "README.md").read_text() == "a model card"

    cut_largest(run / "checkpoints" / "2")
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_bytes(lines[0].encode() + b"\n{}\n" + bytes(20) + b"\n")
    capsys.readouterr()
    plain = [argument for argument in finetune(run, chats) if argument != "--json"]
    done = subprocess.run([sys.executable, "-m", "qwen_dist.cli", *plain], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr[:2000]
    said = done.stderr.splitlines()
    assert any(line.startswith(f"the checkpoint {run}/checkpoints/2 cannot be restored (ValueError: ") for line in said), (
        said
    )
    assert "resuming after step 1 of 2" in said
    assert f"{run}/metrics.jsonl has 2 damaged lines, which are left out" in said
    assert (run / "damaged-checkpoint-2").is_dir() and sorted(os.listdir(run / "checkpoints")) == ["1", "2"]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((again[name] == value).all() for name, value in result.items())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]

    for step in ("1", "2"):
        (aside / "checkpoints" / step / "position" / "metadata").write_text("")
    before = files_of(aside)
    for _ in range(2):  # nothing is moved, and the second run does not start over
        capsys.readouterr()
        assert main(finetune(aside, chats)) == 1
        error = capsys.readouterr().err
        assert f"{aside}/checkpoints/2 cannot be restored" in error and "the 1 older ones cannot be read either" in error
        assert f"remove {aside}/checkpoints" in error and "--overwrite" in error and "Traceback" not in error
        assert files_of(aside) == before
    assert main(finetune(run, chats, "--overwrite")) == 0
    assert not (run / "damaged-checkpoint-2").exists()


@pytest.mark.parametrize("line", ["{}", "\0" * 20, '{"step": "1"}', '{"step": 1, "loss": "x"}', "[" * 9000, "é{"])
def test_damaged_lines_of_metrics_are_left_out(tmp_path, line):
    whole = {"step": 1, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(f'{json.dumps(whole)}\n{line}\n{{"step": 2, "lo')
    said = []
    log = MetricsLog(tmp_path, done=2, tensorboard=False, is_first=True, log=said.append)
    log.add(2, {"loss": 2.0})
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries == [whole, {"step": 2, "loss": 2.0}]
    assert said == [f"{tmp_path}/metrics.jsonl has 1 damaged lines, which are left out"]


def cut_largest(checkpoint: pathlib.Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize("limit", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_full_disk_ends_a_run_with_one_sentence(tmp_path, chats, capsys, limit):
    """A limit of the size of files, as for a full disk: the run can be resumed afterwards."""
    arguments = finetune(tmp_path / "run", chats)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 1 and "Traceback" not in error and "run the same command again" in error
    assert main(arguments) == 0


def test_a_second_run_in_one_directory_is_refused(failed, tmp_path, chats):
    run = tmp_path / "run"
    run.mkdir()
    (run / "qwen_dist_run.json").write_text('{"kind": "training run", "version": 1}')
    with run_lock(str(run / "run.lock"), str(run)):
        code, error = failed(*finetune(run, chats))
    assert code == 1 and f"is in use by process {os.getpid()} on " in error


# --- export ---


def export(output, *flags) -> list[str]:
    return list(map(str, ("export", "--model", DEMO, "--output", output, *flags)))


def test_export_over_links_and_notes(failed, tmp_path, capsys):
    output, link = tmp_path / "model", tmp_path / "link"
    assert main(export(output)) == 0
    (output / "README.md").write_text("mine")
    (output / "notes").mkdir()
    (output / "notes" / "one.txt").write_text("1")
    link.symlink_to(output)
    before = files_of(output)
    failed(*export(link))
    assert files_of(output) == before
    for number in range(2):
        assert main(export(link, "--overwrite")) == 0, number
        assert link.is_symlink() and (output / "README.md").read_text() == "mine"
        assert (output / "notes" / "one.txt").read_text() == "1"
    (output / "lora.safetensors").write_bytes(b"of another origin")
    before = files_of(output)
    _, error = failed(*export(output, "--overwrite"))
    assert "lora.safetensors" in error and files_of(output) == before
    assert sorted(os.listdir(tmp_path)) == ["link", "model"]


def test_export_does_not_replace_what_it_reads(failed, tmp_path):
    source = tmp_path / "outer" / "model"
    shutil.copytree(DEMO, source)
    (tmp_path / "outer" / "config.json").write_text("{}")
    before = files_of(tmp_path)
    for output in (source, tmp_path / "outer"):
        code, error = failed("export", "--model", source, "--output", output, "--overwrite")
        assert code == 2 and "--model" in error and files_of(tmp_path) == before


def test_a_directory_with_a_config_json_is_no_checkpoint(failed, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"port": 8080}')
    (project / "LICENSE").write_text("mine")
    before = files_of(project)
    code, error = failed(*export(project, "--overwrite"))
    assert code == 1 and "is not a checkpoint directory" in error and files_of(project) == before


def test_an_export_is_refused_before_the_model_is_loaded(failed, tmp_path):
    """The weights are cut, which only loading would find."""
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(DEMO, source)
    os.truncate(source / "model.safetensors", 1000)
    output.mkdir()
    (output / "diary.txt").write_text("dear diary")
    for name, expected in (("out", "exists; choose another output"), ("x" * 250, "File name too long")):
        code, error = failed("export", "--model", source, "--output", tmp_path / name)
        assert code in (1, 2) and expected in error


def test_what_lies_in_the_way_of_the_staging_directory(failed, tmp_path):
    output, staging = tmp_path / "model", tmp_path / ".model.saving"
    staging.mkdir()
    (staging / "diary.txt").write_text("dear diary")
    code, error = failed(*export(output))
    assert code == 1 and "was not made by qwen-dist" in error and (staging / "diary.txt").exists()
    shutil.rmtree(staging)
    (tmp_path / "elsewhere").mkdir()
    staging.symlink_to(tmp_path / "elsewhere")
    assert main(export(output)) == 0
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "model"]


def test_a_locked_output_names_its_holder(tmp_path):
    lock, holder = str(tmp_path / "lock"), f"it is in use by process {os.getpid()}"
    with run_lock(lock, "it"), pytest.raises(UserError, match=holder), run_lock(lock, "it"):
        pass


# --- pages ---


@pytest.mark.parametrize("verb", ["plan", "parity"])
def test_pages_are_checked_before_the_work(failed, verb, tmp_path):
    flags = {"plan": ("--topology", "v5e:8x8", "--chart"), "parity": ("--report",)}[verb]
    code, error = failed(verb, "--model", DEMO, *flags, tmp_path / "none" / "page.html")
    assert code == 2 and "there is no directory" in error
