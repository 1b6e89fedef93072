"""The command line as its users meet it: what they mistype, what is missing on their machine, and what is shown."""

import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from qwen_dist import failures
from qwen_dist.batch.progress import TimeLeft, clock, describe_summary
from qwen_dist.batch.run import BatchSummary
from qwen_dist.charts import axis_end
from qwen_dist.cli import main
from qwen_dist.cli.chat_session import ChatSession
from qwen_dist.config import (
    FinetuneConfig,
    GenerateConfig,
    LoraOptions,
    OptimizerOptions,
    bind_config,
    load_config,
    parse_bytes,
)
from qwen_dist.errors import CheckpointError, UsageError, UserError
from qwen_dist.parity.checks import NOT_JUDGED, NextTokenAgreement, ParityReport
from qwen_dist.runtime import memory
from qwen_dist.runtime.stderr_filter import dropped_lines
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.train.optim import num_warmup_steps


def code_and_message(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err) < 5000
    return code, err


# --- mistyped ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("generate", "--promt", "hi"), "did you mean --prompt?"),
        (("generate", "--temp", "1"), "did you mean --temperature?"),
        (("generate", "--max-tokens=5"), "did you mean --max-new-tokens?"),
        (("finetune", "--lr", "1e-4"), "did you mean --learning-rate?"),
        (("finetune", "--lora-rank", "8"), "did you mean --config.lora.rank?"),
        (("generate", "-p", "hi"), "did you mean --prompt?"),
        (("generate", "hello"), "did you mean --prompt 'hello'?"),
        (("generate", "--promt", "hi", "--temp", "1"), "--temp: did you mean --temperature?"),
        (("generat",), "'generat' is not a command; did you mean generate?"),
        (("run",), "'run' is not a command; did you mean generate?"),
        (("generate", "--bo\x1bgus"), "\\x1bgus"),
        (("finetune",), "model.path is missing; give --model"),
        (("batch", "--input", "x"), "output is missing; give --output"),
        (("batch", "--input", "no-such-file", "--output", "o"), "--input cannot be read: there is no file no-such-file"),
        (("finetune", "--model", "x", "--data", "no.jsonl", "--output", "o"), "there is no file no.jsonl"),
        (("finetune", "--model", "x", "--data", "a" * 5000 + ".jsonl", "--output", "o"), "there is no file aaa"),
        (("generate", "--config", "no.yaml"), "there is no file no.yaml"),
        (("generate", "--prompt", "x", "--start-timeout", "nan"), "--start-timeout is nan; it must be a number of seconds"),
        (("export", "--output", "o", "--model", "x", "--max-shard-size", "9" * 400), "has 400 digits"),
    ],
)
def test_usage_errors_say_what_to_do_and_exit_with_2(capsys, arguments, expected):
    code, message = code_and_message(capsys, *arguments)
    assert (code, expected in message) == (2, True), message


@pytest.mark.parametrize("name", ["m" * 5000, "a\0b", "~nobody-at-all/x/y"])
def test_impossible_model_names(name):
    with pytest.raises(CheckpointError, match="is neither a directory nor a hub id") as error:
        ModelFiles.open(name)
    assert len(str(error.value)) < 600 and "\0" not in str(error.value)


def test_a_revision_may_follow_a_hub_id(monkeypatch, tmp_path):
    """As in inspect and export. The hub is offline here, so the message is that of the download."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be opened on the hub"):
        ModelFiles.open("Qwen/Qwen3-0.6B@main")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": float("nan")},
        {"epochs": float("inf")},
        {"optimizer": {"learning_rate": float("nan")}},
        {"optimizer": {"learning_rate": -1.0}},
        {"optimizer": {"warmup_steps": 3, "warmup_ratio": 0.1}},
        {"optimizer": {"warmup_ratio": 1.5}},
        {"optimizer": {"warmup_steps": 11}, "steps": 10},
        {"lora": {"target_modules": ("(",)}},
    ],
)
def test_training_options_that_cannot_be_used(change):
    base = {"model": {"path": "x"}, "data": {"files": ("d.jsonl",)}, "output": "o"}
    with pytest.raises(UsageError):
        bind_config(FinetuneConfig, base | change)
    with pytest.raises(UsageError, match="has 400 digits"):
        parse_bytes("9" * 400)


# --- configuration files ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.yaml", "model:\n  path: some/dir\nsampling.top_k: 3\nmesh: tensor=2\n"),
        ("c.yml", "model.path: some/dir\nsampling: {top_k: 3}\nmesh: tensor=2\n"),
        ("c.json", json.dumps({"model": {"path": "some/dir"}, "sampling.top_k": 3, "mesh": "tensor=2"})),
    ],
)
def test_configurations_in_yaml_and_json(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    config = load_config(GenerateConfig, str(tmp_path / name), [], {})
    assert (config.model.path, config.sampling.top_k, config.mesh) == ("some/dir", 3, "tensor=2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "model: {path: x}\nmehs: a\n", "mehs is not a field; did you mean mesh"),
        ("c.yaml", "a: [1,\n", "is not YAML"),
        ("c.yaml", "a: &x [1]\nb: *x\n", "aliases"),
        ("c.yaml", "[" * 100, "is not YAML|nested deeper"),
        ("c.yaml", "- a\n", "must hold keys and values"),
        ("c.yaml", "!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("c.yaml", "1: a\n", "is not a text"),
        ("c.yaml", "model.path: x\nmodel: {path: y}\n", "path is given twice"),
        ("c.yaml", "model:\n  path: x\n  path: y\n", "the key 'path' occurs twice"),
        ("c.yaml", "seed: 0x" + "f" * 60_000, "too many digits"),
        ("c.yaml", "a" + ".a" * 30 + ": 1\n", "nested deeper"),
        ("c.yaml", "".join(f"key{number}: 1\n" for number in range(500)), "and [0-9]+ more"),
        ("c.yaml", "#" * 70_000, "at most 65536 are read"),
        ("c.json", "{", "is not JSON"),
        ("c.toml", "a = 1", "must end in .py, .yaml, .yml or .json"),
    ],
)
def test_invalid_yaml_and_json(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_config(GenerateConfig, str(tmp_path / name), [], {"mesh": "data=1"})


# --- training defaults ---


def test_learning_rate_by_method_and_length_by_context():
    base = {"model": {"path": "x"}, "data": {"files": ("d.jsonl",)}, "output": "o"}
    for method, rate in (("lora", 2e-4), ("full", 1e-5)):
        config = bind_config(FinetuneConfig, base | {"method": method}).resolved(256)
        assert (config.optimizer.learning_rate, config.data.max_length) == (rate, 256)
    given = bind_config(FinetuneConfig, base | {"optimizer": {"learning_rate": 3e-3}}).resolved(4096)
    assert (given.optimizer.learning_rate, given.data.max_length, given.lora) == (3e-3, 1024, LoraOptions())


def test_warm_up_steps_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for ratio, steps in ((0.1, 4), (0.1, 95), (0.5, 7), (0.0, 3)):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True)
        assert num_warmup_steps(OptimizerOptions(warmup_ratio=ratio), steps) == arguments.get_warmup_steps(steps)
    with pytest.raises(UsageError, match="warmup_steps is 10, and the run has 4 steps"):
        num_warmup_steps(OptimizerOptions(warmup_steps=10), 4)


# --- the machine ---


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("cuda", "pip install 'qwen-dist[cuda]'"),
        ("tpu", "pip install 'qwen-dist[tpu]'"),
        ("nonsense", "use cpu, cuda or tpu"),
    ],
)
def test_a_device_that_is_not_there(platform, expected):
    done = subprocess.run(
        [sys.executable, "-m", "qwen_dist", "inspect", "--kernels"],
        env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, expected in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr


def test_not_enough_memory_is_one_sentence():
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("RESOURCE_EXHAUSTED: 5 GB")):
        message = failures.describe_failure(error)
        assert message.startswith("not enough memory") and "--dtype" in message and "plan" in message
    assert not failures.is_out_of_memory(ValueError("shapes differ"))


def test_limits_of_the_shell_count():
    program = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "from qwen_dist.runtime.memory import available_memory\nprint(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**32
    assert memory.available_memory() > 0


def test_a_fault_of_the_program_names_its_place():
    try:
        raise TypeError("a\x1b[2Jb\nmore")
    except TypeError as error:
        message = failures.describe_failure(error)
    assert "TypeError" in message and "test_cli_messages.py:" in message and "--debug" in message
    assert "\x1b" not in message and "\n" not in message


def test_lines_of_other_libraries_are_dropped(capfd):
    with dropped_lines("Involuntary"):
        os.write(2, b"W0000 Involuntary full rematerialization\nanother line\n")
    assert capfd.readouterr().err == "another line\n"


# --- progress ---


def test_time_left_does_not_count_compiling():
    left = TimeLeft()
    assert left.after(100.0, 0, 6000) == "–"  # compiling
    assert left.after(126.0, 10, 6000) == "–"  # the first results
    assert left.after(136.0, 30, 6000) == clock(5970 / 2)
    assert (clock(59), clock(61), clock(3661)) == ("0:59", "1:01", "1:01:01")


def test_axes_end_at_round_numbers():
    assert [axis_end(value) for value in (0, 4.427, 60, 99.1, 108718.2)] == [1, 5, 60, 100, 200000]


def test_summaries_of_a_batch():
    nothing = BatchSummary(num_before=23)
    assert describe_summary(nothing, "o", {}, num_left=None) == "nothing to do: all 23 records have a result in o"
    some = BatchSummary(num_answered=3, num_errors=2, seconds=1.0)
    text = describe_summary(some, "o", {"too long": 2}, num_left=5804)
    assert "2 × too long" in text and "run the same command to continue (5,804 left)" in text


def test_the_second_ctrl_c_of_a_batch_ends_at_once():
    program = """
import os, signal, time
from qwen_dist.cli.session import catch_interrupt
with catch_interrupt() as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n") and "again stops at once" in done.stderr


def test_a_comparison_of_few_rows_is_not_judged():
    facts = {NOT_JUDGED: "at least 8 rows are needed, and there are 1"}
    nothing = np.zeros(0)
    report = ParityReport(facts, [], NextTokenAgreement(nothing, nothing, nothing, nothing), np.zeros((0, 2)))
    assert report.verdict().startswith("not judged: at least 8 rows") and not report.is_judged


# --- documents ---


def test_the_python_of_the_page_on_loading_runs(tiny_directory, tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "loading.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model = tiny_directory("qwen3", num_hidden_layers=1, hidden_size=40)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("DIR", str(model)), {})
    assert (tmp_path / "new-directory" / "model.safetensors").is_file()


# --- chat ---


@pytest.fixture
def chat(monkeypatch, capsys):
    """Return a function (lines) -> (prompts that the model has seen, standard error); an exception in lines is raised."""

    def run(*lines) -> tuple[list, str]:
        given, seen = list(lines), []

        def read(prompt: str) -> str:
            line = given.pop(0) if given else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        def respond(ids) -> str:
            seen.append(ids)
            if ids[-1]["content"] == "stop me":
                raise KeyboardInterrupt
            if ids[-1]["content"] == "too long":
                raise UserError("too long for the context")
            return f"answer {len(seen)}"

        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        assert ChatSession(lambda messages: [dict(m) for m in messages], respond, 100).run("a model") == 0
        return seen, capsys.readouterr().err

    return run


def test_commands_of_a_chat(chat):
    seen, err = chat("/help", "hi", "/system Be brief.", "hi", "/clear", "hi", "/bogus", "/exit", "not read")
    assert [len(messages) for messages in seen] == [1, 2, 2]
    assert seen[2][0] == {"role": "system", "content": "Be brief."}
    assert "/bogus is not a command" in err and "forget the conversation" in err and "context 100 tokens" in err


def test_ctrl_c_in_a_chat(chat):
    """At the prompt it clears the line; during an answer it stops that, and the turn is forgotten."""
    seen, err = chat("hi", KeyboardInterrupt(), "stop me", "too long", "again")
    assert [message["content"] for message in seen[-1]] == ["hi", "answer 1", "again"]
    assert "line cleared; Ctrl-D or /exit ends the chat" in err and "(stopped)" in err and "too long for" in err


def test_messages_of_several_lines(chat):
    seen, _ = chat("one\\", "two", '"""three', "", 'four"""')
    assert [message["content"] for message in seen[-1]] == ["one\ntwo", "answer 1", "three\n\nfour"]
