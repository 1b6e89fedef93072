"""What runs write and read again, configurations in YAML, and both ends of the wires, damaged.

A case ends in a result or in one line, and nothing that was there is lost: files are as before, or moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import threading
import time

import pytest
from bounds import check_cases
from damage import HOSTILE, SPOILED, damaged_bytes, damaged_json, dumps
from hypothesis import strategies as st

from qwen_dist.batch.manifest import MANIFEST_FORMAT, check_manifest
from qwen_dist.batch.output import OutputFile
from qwen_dist.config import BatchConfig, FinetuneConfig, bind_config, load_config
from qwen_dist.errors import UserError
from qwen_dist.outputs import Marker, run_lock
from qwen_dist.runtime import control
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.distributed import _run_preflight
from qwen_dist.train.checkpoints import Checkpoints
from qwen_dist.train.run import RUN_MARKER, _Start, prepare, set_up, train

# What Orbax has begun to read of a damaged checkpoint is dropped with its error, maybe only during a later test; in a run
# the hook of `Checkpoints` says nothing of it.
pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def replaced(directory: pathlib.Path, files: dict[str, bytes]) -> None:
    """Make these the only files of a directory."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


# --- configurations ---

YAML = """
model: {path: some/dir, dtype: float32}
data:
  files: [a.jsonl, b.jsonl]
  max_length: 64
optimizer.learning_rate: 1.0e-4
lora:
  target_modules: [q_proj, v_proj]
output: run
steps: 10
epochs: 2.5
mesh: data=1
chat: {template_args: ["a=1"]}
"""
ODD_YAML = [
    *("", "---\n", "...", "\x00", "\ufeffsteps: 3\n", "- a\n", "a", "? [a, b]\n: 1\n", "steps: 1\n---\nsteps: 2\n"),
    *("a: &x [1]\nb: *x\n", "model: {<<: {path: x}, path: y}\n", "steps: 3\nsteps: 4\n", "model:\n  path: a\n  path: b\n"),
    *("steps: !!python/object/apply:os.system ['true']\n", "output: !!binary aGk=\n", "data: {files: !!set {a, b}}\n"),
    *(
        "steps: 2024-01-01\n",
        "output: 9999-99-99\n",
        "epochs: .nan\n",
        "epochs: .inf\n",
        "epochs: 1e999\n",
        "steps: 1:30\n",
    ),
    *("steps: 0x" + "f" * 60_000, "steps: " + "9" * 5000, "steps: 1" + "_" * 60_000, "steps: " + "1:" * 30_000 + "1"),
    *("[" * 60_000, "{" * 60_000, "- " * 30_000, "? " * 30_000, "'" * 60_000, ":" * 60_000, "%YAML 9.9\n---\na: 1"),
    *("".join(" " * level + "a:\n" for level in range(300)), "a" + ".a" * 30_000 + ": 1", "#" * 60_000),
    *("".join(f"k{number}: 1\n" for number in range(6000)), "steps: [" + "1," * 30_000 + "]", "a: 1\n" * 100_000),
    *("model: {path: [\n", "model:\n\tpath: x\n", 'output: "\\x1b[31m"\n', 'output: "\\ud800"\n', 'output: "a\\0b"\n'),
]


def test_configuration_files(tmp_path):
    yaml, other = tmp_path / "c.yaml", tmp_path / "c.json"
    given = {"model": {"path": "m", "dtype": "float32"}, "data": {"files": ["d"]}, "steps": 3, "output": "o"}

    def run(content):
        for path in (yaml, other):
            path.write_bytes(content)
            for kind in (FinetuneConfig, BatchConfig):
                with contextlib.suppress(UserError):
                    load_config(kind, str(path), [], {"mesh": "data=1"})
        load_config(FinetuneConfig, str(yaml), [], {})

    known = [text.encode("utf-8", "surrogatepass") for text in ODD_YAML] + ["steps: 3".encode("utf-16")]
    known += [spoil(dumps(given)) for spoil in SPOILED.values()]
    pieces = st.sampled_from(
        ["- ", "? ", ": ", "&a ", "*a ", "!!int ", "[", "{", "}", "|\n ", ">\n", '"', "'", "#", "\t", "%"]
    )
    inserted = st.builds(
        lambda at, piece: (YAML[:at] + piece + YAML[at:]).encode(), st.integers(0, len(YAML)), pieces | st.text(max_size=5)
    )
    cases = inserted | damaged_bytes(YAML.encode()) | damaged_json(given)
    check_cases("configuration files", run, cases, known=known, max_examples=400)


# --- what a batch writes ---


def test_manifests(tmp_path):
    """A manifest is read for the description of changed settings, and before it is replaced."""
    directory = tmp_path / "batch"
    output = directory / "out.jsonl"
    directory.mkdir()
    settings = {"sampling": {"top_k": 3}, "dtype": "float32"}
    with OutputFile(output, settings=json.dumps(settings)) as file:
        file.write({"id": "a"}, 1)
    manifest = {"format": MANIFEST_FORMAT, "is_complete": True, "settings": settings, "counts": {"num_errors": 0}}
    valid = files_of(directory) | {"out.jsonl.manifest.json": dumps(manifest)}

    def run(content):
        files = valid | {"out.jsonl.manifest.json": content}
        replaced(directory, files)
        with pytest.raises(UserError, match="holds results of"):
            OutputFile(output, settings=json.dumps(settings | {"dtype": "bfloat16"}))
        assert files_of(directory) == files
        check_manifest(str(output))
        replaced(directory, {"out.jsonl.manifest.json": content})
        try:
            check_manifest(str(output))
        finally:
            assert files_of(directory) == {"out.jsonl.manifest.json": content}

    known = [spoil(dumps(manifest)) for spoil in SPOILED.values()]
    check_cases("manifests", run, damaged_json(manifest, ("format", "settings")), known=known)


def test_journals_lose_no_result(tmp_path):
    """Of a damaged journal or output every whole result stays: in the output, or in a file that a message names."""
    directory = tmp_path / "batch"
    output = directory / "out.jsonl"
    directory.mkdir()
    with OutputFile(output, settings="s") as file:
        for number in range(6):
            file.write({"id": str(number), "text": "x" * number}, number)
    results, entries = output.read_bytes(), (directory / "out.jsonl.journal").read_bytes()

    def run(contents):
        replaced(directory, {"out.jsonl": contents[0], "out.jsonl.journal": contents[1]})
        error = None
        try:
            with OutputFile(output, settings="s") as file:
                num_before = file.num_before
        except UserError as problem:
            error = problem
        files = files_of(directory)
        before = contents[0].split(b"\n")
        whole, now = before[:-1], b"\n".join(files.values()).split(b"\n")
        # The last one, complete or torn, may be that of a killed run.
        lost = [line for line in whole[: -1 if before[-1] == b"" else None] if line not in now]
        assert not lost, f"lost: {lost[:3]}"
        if error is not None:
            assert files["out.jsonl"] == contents[0]
            raise error
        assert contents[0].startswith(files["out.jsonl"]) and files["out.jsonl"].count(b"\n") == num_before

    damaged = st.tuples(st.just(results), damaged_bytes(entries)) | st.tuples(damaged_bytes(results), st.just(entries))
    moved = st.permutations([entries[at : at + 24] for at in range(24, len(entries), 24)])
    cases = damaged | moved.map(lambda parts: (results, entries[:24] + b"".join(parts)))
    known = [(results, entries[:24]), (results, entries[:24] + bytes(24 * 6)), (bytes(len(results)), entries)]
    known += [(results, entries[:at] + bytes([entries[at] ^ 255]) + entries[at + 1 :]) for at in range(0, len(entries), 5)]
    known += [(results + results, entries), (results, entries + entries[24:]), (results, entries[:24] + entries[48:])]
    check_cases("journals", run, cases, known=known, max_examples=200)


# --- what a training run writes ---


@pytest.fixture(scope="module")
def trained(tiny_directory, chats, tmp_path_factory):
    """The inputs of a run, its trainer, and the files of its two checkpoints."""
    output = tmp_path_factory.mktemp("trained") / "run"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16}
    model = {"path": str(tiny_directory("qwen3", **sizes)), "dtype": "float32"}
    values = {"model": model, "data": {"files": (str(chats),), "max_length": 64}, "lora": {"rank": 2}, "mesh": "data=1"}
    values |= {"output": str(output), "steps": 2, "save_every": 1, "batch_size": 2}
    inputs = prepare(bind_config(FinetuneConfig, values))
    train(inputs)
    return inputs, set_up(inputs), files_of(output / "checkpoints")


CHECKPOINT_DAMAGE = ["missing", "empty", "cut", "zeros", "byte", "json", "directory", "swapped", "link", "longer", "all"]


def test_training_checkpoints(trained):
    """The older checkpoint is taken, or one line says what to do; damaged files stay, perhaps in a renamed folder."""
    inputs, setup, files = trained
    output = pathlib.Path(inputs.config.output)
    checkpoints = output / "checkpoints"
    names = sorted(name for name in files if name.startswith("2/"))

    def damage(kind: str, name: str, at: float) -> None:
        path, content = checkpoints / name, files[name]
        place = int(at * max(len(content) - 1, 0))
        if kind in ("missing", "directory", "link"):
            path.unlink()
        if kind == "directory":
            path.mkdir()
        if kind == "link":
            path.symlink_to("/dev/zero")
        if kind == "all":
            shutil.rmtree(checkpoints / "2")
            (checkpoints / "2").mkdir()
        changed = {
            "empty": b"",
            "cut": content[:place],
            "zeros": bytes(len(content)),
            "byte": content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :] if content else b"x",
            "json": dumps(HOSTILE[int(at * (len(HOSTILE) - 1))]),
            "swapped": files[names[int(at * (len(names) - 1))]],
            "longer": content + b"}" * 10,
        }
        if kind in changed:
            path.write_bytes(changed[kind])

    def run(damages):
        shutil.rmtree(output, ignore_errors=True)
        replaced(checkpoints, files)
        for one in damages:
            if (checkpoints / one[1]).is_file() and not (checkpoints / one[1]).is_symlink():
                damage(*one)
        before = files_of(output)
        said = []
        try:
            with contextlib.closing(Checkpoints(checkpoints, keep=2, keep_best=False)) as opened:
                state, _, step = _Start(inputs, opened, said.append).restore(setup)
                assert int(state.step) == step, f"step {step} has the state of step {int(state.step)}"
                assert step > 0, "the run begins again"
        finally:
            now = files_of(output)
            moved = {name.replace("checkpoints/2/", "damaged-checkpoint-2/"): name for name in before}
            kept = {moved.get(name, name): content for name, content in now.items()}
            lost = [name for name, content in before.items() if kept.get(name) != content]
            assert not lost, f"lost or changed: {lost[:3]}"

    one = st.tuples(st.sampled_from(CHECKPOINT_DAMAGE), st.sampled_from(names), st.floats(0, 1))
    known = [[(kind, name, 0.5)] for name in names for kind in ("missing", "cut", "json")]
    known += [[("cut", f"{step}{name[1:]}", 0.5) for step in (2, 1)] for name in names]
    known += [[("link", "2/_CHECKPOINT_METADATA", 0.5)]]  # Orbax reads it when it opens the folder
    check_cases("training checkpoints", run, st.lists(one, min_size=1, max_size=3), known=known, max_examples=40)


def test_positions_in_the_data(trained):
    inputs, setup, files = trained
    output = pathlib.Path(inputs.config.output)
    valid = json.loads(files["2/position/metadata"])

    def run(content):
        shutil.rmtree(output, ignore_errors=True)
        replaced(output / "checkpoints", files | {"2/position/metadata": content})
        with contextlib.closing(Checkpoints(output / "checkpoints", keep=2, keep_best=False)) as opened:
            _, batches, _ = _Start(inputs, opened, lambda text: None).restore(setup)
        next(batches)

    known = [spoil(dumps(valid)) for spoil in SPOILED.values()]
    known += [dumps(valid | {"data": value}) for value in ({}, {"x": 1}, [], None)]
    check_cases("positions in the data", run, damaged_json(valid), known=known, max_examples=60)


def test_exchanged_checkpoints(trained):
    """A folder with the name of another step, as after a wrong copy."""
    inputs, setup, files = trained
    output = pathlib.Path(inputs.config.output)

    def run(case):
        shutil.rmtree(output, ignore_errors=True)
        replaced(output / "checkpoints", {case(name): content for name, content in files.items() if case(name)})
        with contextlib.closing(Checkpoints(output / "checkpoints", keep=2, keep_best=False)) as opened:
            state, _, step = _Start(inputs, opened, lambda text: None).restore(setup)
        assert int(state.step) == step, f"step {step} has the state of step {int(state.step)}"

    swap = str.maketrans("12", "21")
    exchanged = [
        lambda name: name[0].translate(swap) + name[1:],
        lambda name: "7" + name[1:] if name[0] == "2" else name,
        lambda name: "2" + name[1:] if name[0] == "1" else "",
    ]
    check_cases("exchanged checkpoints", run, st.sampled_from(exchanged), known=exchanged, max_examples=1)


def test_markers_and_locks(tmp_path):
    directory = tmp_path / "run"
    name = RUN_MARKER.name
    valid = {"kind": RUN_MARKER.kind, "version": RUN_MARKER.version}

    def place(what, path: pathlib.Path) -> None:
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "directory":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        else:
            path.symlink_to(what)

    def run(case):
        marker, lock = case
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "thesis.txt").write_text("precious")
        place(marker, directory / name)
        place(lock, directory / "run.lock")
        before, listed = files_of(directory), sorted(os.listdir(directory))
        is_run, errors = None, []
        try:
            is_run = Marker(name, RUN_MARKER.kind, RUN_MARKER.version).check(directory, "--output")
        except UserError as error:
            errors.append(error)
        assert files_of(directory) == before and sorted(os.listdir(directory)) == listed
        try:
            with run_lock(str(directory / "run.lock"), str(directory)):
                pass
            assert isinstance(lock, bytes) and (not lock or lock.startswith(b"process ")), "a foreign file is removed"
        except UserError as error:
            errors.append(error)
            assert sorted(os.listdir(directory)) == listed and files_of(directory) == before
        assert (directory / "thesis.txt").read_text() == "precious"
        if is_run:
            assert json.loads(marker) == valid or {**json.loads(marker), **valid} == json.loads(marker)
        if errors:
            raise errors[0]

    odd = st.sampled_from(["directory", "pipe", "socket", "/dev/zero", "/dev/null", "nowhere", "thesis.txt", name])
    held = b"process 1 on host since 2026-01-01 00:00:00\n"
    locks = st.just(held) | damaged_bytes(held) | odd.filter(lambda what: what != name)
    cases = st.tuples(damaged_json(valid) | odd, st.just(b"")) | st.tuples(st.just(dumps(valid)), locks)
    known = [(spoil(dumps(valid)), b"") for spoil in SPOILED.values()] + [(dumps(valid), b""), (dumps(valid), held)]
    check_cases("markers and locks", run, cases, known=known)


# --- the control channel ---


@contextlib.contextmanager
def pair():
    """Two ends of a TCP connection: a socket and a `Connection`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near = control.Connection(listener.accept()[0])
    try:
        yield far, near
    finally:
        far.close()
        near.close()


def test_preflight_results():
    """What a process takes from something else than its process 0."""
    valid = {"problems": [], "names": ["process 0 on a (pid 1)", "process 1 on b (pid 2)"]}

    def run(content):
        def send(far: socket.socket) -> None:
            with contextlib.suppress(OSError):
                far.sendall(content)
                far.shutdown(socket.SHUT_WR)

        with pair() as (far, near):
            sender = threading.Thread(target=send, args=(far,))
            sender.start()
            try:
                names = _run_preflight(Cluster("127.0.0.1:1", 2, 1, "flags"), {0: near}, {}, 0.5)
            finally:
                near.close()
                sender.join()
        assert len(names) == 2 and all(isinstance(name, str) for name in names)

    known = [spoil(dumps(valid)) + b"\n" for spoil in SPOILED.values()]
    known += [dumps(value) + b"\n" for value in ({"problems": [5]}, {"problems": [], "names": []}, {"names": [1, 2]})]
    known += [b"x" * 2**25, b'{"problems": ["' + b"x" * 2**20 + b'"]}\n', dumps(valid)]
    cases = damaged_json(valid).map(lambda text: text + b"\n") | damaged_bytes(dumps(valid) + b"\n")
    check_cases("preflight results", run, cases, known=known, max_examples=150)


@pytest.mark.parametrize("is_slow", [False, True])
def test_messages_end_by_their_deadline_and_size(monkeypatch, is_slow):
    """Frames without an end, at full speed and byte by byte."""
    stop = threading.Event()

    def send(far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                far.sendall(b"x" if is_slow else b"x" * 2**20)
                if is_slow:
                    time.sleep(0.01)

    def run(max_bytes):
        stop.clear()
        with pair() as (far, near):
            sender = threading.Thread(target=send, args=(far,))
            sender.start()
            start = time.monotonic()
            try:
                near.receive(start + 1.0, max_bytes)
                raise AssertionError("a message without an end was received")
            except (TimeoutError, ValueError) as error:
                assert isinstance(error, TimeoutError) == is_slow
                raise UserError(str(error)) from None
            finally:
                assert time.monotonic() - start < 3
                stop.set()
                near.close()
                sender.join()

    check_cases(f"endless messages {is_slow}", run, st.just(2**20), known=[2**16, 2**27], max_examples=1)


def test_a_reader_that_never_reads_does_not_hold_a_sender(monkeypatch):
    """TCP gives up a connection whose other end takes nothing for so long."""
    monkeypatch.setattr(control, "KEEPALIVE_IDLE_S", 1)
    monkeypatch.setattr(control, "KEEPALIVE_EVERY_S", 1)
    monkeypatch.setattr(control, "KEEPALIVE_PROBES", 1)
    with pair() as (_, near):
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < start + 30:
                near.send({"message": "x" * 2**20})
        assert time.monotonic() - start < 20
