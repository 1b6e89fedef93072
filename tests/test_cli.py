"""The command line: answers, chats, exit codes, and one readable line per error."""

import dataclasses
import gzip
import importlib.metadata
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import typing
from typing import NamedTuple

import jax
import pytest
import safetensors.numpy
import torch
import transformers

from qwen_dist.cli import main
from qwen_dist.cli.commands import COMMANDS
from qwen_dist.config import BatchConfig
from qwen_dist.tokenizer import Tokenizer

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 1}
# 41 tokens, and 58 with the chat template: all runs with one prompt use the same prefill program.
PROMPT = "the quick brown fox jumps over the lazy dog; " * 4
# Flags of most runs here; generation_config.json sets the rest: greedy, with a repetition penalty.
FLAGS = ("--dtype", "float32", "--max-new-tokens", "12")


class Result(NamedTuple):
    """The exit code and the output of a run."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Undo what the commands set: they run in this process."""
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_enable_x64")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def model(tiny_directory) -> pathlib.Path:
    return tiny_directory("qwen3", {"repetition_penalty": 1.1}, **SIZES)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function (*arguments, stdin="", terminal=False) -> Result."""

    def run(*arguments, stdin: str = "", terminal: bool = False) -> Result:
        given = io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")), encoding="utf-8")
        given.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", given)
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)

    return run


def changed(directory: pathlib.Path, name: str, **values) -> None:
    """Change keys of a JSON file in a checkpoint directory."""
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(content | values))


# --- generate ---


def test_an_answer_equals_transformers(run, model):
    """With the chat template and generation_config.json: the text and the token counts."""
    result = run("generate", "--model", model, "--prompt", PROMPT, *FLAGS, "--json")
    assert (result.code, result.err) == (0, "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    expected = reference.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :].tolist()
    assert result.json == {
        "text": tokenizer.decode(expected, skip_special_tokens=True),
        "finish_reason": "length",
        "token_ids": expected,
        "usage": {"prompt_tokens": ids["input_ids"].shape[1], "completion_tokens": 12},
    }


def test_every_way_to_give_a_prompt(run, model):
    base = ("generate", "--model", model, *FLAGS)
    whole = run(*base, "--prompt", PROMPT, "--json").json
    assert run(*base, "--prompt", PROMPT) == (0, whole["text"] + "\n", "")
    for end in ("", "\n", "\r\n"):  # one newline is echo's
        assert run(*base, stdin=PROMPT + end) == (0, whole["text"] + "\n", "")
    chat = Tokenizer.open(model).render_chat([{"role": "user", "content": PROMPT}])
    assert run(*base, "--raw", "--prompt", chat, "--json").json == whole
    raw = run(*base, "--raw", "--prompt", PROMPT, "--json").json
    assert raw["usage"]["prompt_tokens"] == len(Tokenizer.open(model).encode(PROMPT))
    assert raw["token_ids"] != whole["token_ids"]


def test_all_but_one_newline_of_standard_input_are_the_prompt(run, model):
    base = ("generate", "--model", model, *FLAGS, "--raw", "--json")
    assert run(*base, stdin=PROMPT + "\n\n").json == run(*base, "--prompt", PROMPT + "\n").json
    assert run(*base, stdin=" a\r\nb\r").json == run(*base, "--prompt", " a\r\nb\r").json


def test_standard_input_that_is_not_utf_8_is_one_line(run, model):
    result = run("generate", "--model", model, *FLAGS, stdin="ab\udcff\n")
    assert result.code == 1
    assert result.err == "qwen-dist generate: standard input is not UTF-8 (byte 3); give the prompt in UTF-8\n"


def test_variables_of_the_chat_template(run, model, tiny_directory):
    base = ("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    off = run(*base, "--thinking", "off").json
    assert off["usage"]["prompt_tokens"] == len(expected)
    assert run(*base, "--template-arg", "enable_thinking=false").json == off
    assert run(*base, "--config.chat.thinking=off").json == off
    assert run(*base, "--thinking", "on").json == run(*base).json
    assert run(*base, "--thinking", "maybe").code == 2
    assert run(*base, "--thinking", "off", "--raw").code == 2
    unused = run(*base, "--template-arg", "lang=de")
    assert (unused.code, unused.out) == (2, "")
    assert (
        unused.err
        == "qwen-dist generate: --thinking or --template-arg: the chat template does not use lang; leave it out\n"
    )


def test_a_prompt_that_is_far_too_long_is_not_tokenized(run, model):
    result = run("generate", "--model", model, *FLAGS, stdin="fox " * 2**20)
    assert result.code == 1 and "has 4194304 bytes and so at least" in result.err


def test_the_same_answer_on_a_mesh(run, model):
    base = ("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json")
    alone = run(*base)
    assert run(*base, "--mesh", "data=2,fsdp=2,tensor=2") == alone


def test_log_probabilities_have_the_format_of_the_openai_api(run, model):
    answer = run("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json", "--logprobs", "2").json
    tokenizer = Tokenizer.open(model)
    assert len(answer["logprobs"]) == 12
    for token, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(token)
        assert entry["token"] == tokenizer.token_bytes(token).decode(errors="replace")
        first, second = (top["logprob"] for top in entry["top_logprobs"])
        assert 0 > first >= second and entry["logprob"] <= first


def test_stop_strings_end_an_answer(run, model):
    base = ("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json")
    text = run(*base).json["text"]
    stops = text[7:9], text[4:6]
    answer = run(*base, "--stop", stops[0], "--stop", stops[1]).json
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: min(text.index(stop) for stop in stops)]


def test_the_seed_decides_the_answer(run, model):
    base = ("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json", "--temperature", "1")
    one, again, other = (run(*base, "--seed", seed).json["token_ids"] for seed in (1, 1, 2))
    assert one == again != other


def test_dummy_weights_need_no_weight_files(run, model, tiny_directory):
    empty = tiny_directory("qwen3", **SIZES)
    (empty / "model.safetensors").unlink()
    answer = run("generate", "--model", empty, *FLAGS, "--prompt", PROMPT, "--load-format", "dummy", "--json")
    assert answer.code == 0 and answer.json["usage"]["completion_tokens"] == 12
    assert run("generate", "--model", empty, *FLAGS, "--prompt", PROMPT).code == 1


def test_a_chat_keeps_its_history(run, model):
    base = ("generate", "--model", model, *FLAGS, "--system", "Be brief.")
    chat = run(*base, stdin="fox\nlazy dog\n\nnot read\n", terminal=True)
    assert chat.code == 0
    assert "Chat. An empty line or Ctrl-D ends it" in chat.err
    first, second = (answer.removeprefix("\n> ") for answer in chat.out.split("\n\n> ")[:2])
    first, second = first.removesuffix("\n"), second.removesuffix("\n")
    tokenizer = Tokenizer.open(model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}]
    raw = ("generate", "--model", model, *FLAGS, "--raw", "--json", "--prompt")
    assert run(*raw, tokenizer.render_chat(messages)).json["text"] == first
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "lazy dog"}]
    assert run(*raw, tokenizer.render_chat(messages)).json["text"] == second
    assert run(*base, stdin="", terminal=True).code == 0  # Ctrl-D


def test_a_chat_continues_after_an_error(run, tiny_directory):
    model = tiny_directory("qwen3", **SIZES, max_position_embeddings=64)
    chat = run("generate", "--model", model, *FLAGS, stdin="a b " * 40 + "\nfox\n", terminal=True)
    assert chat.code == 0
    assert "the model's context 64" in chat.err
    assert run("generate", "--model", model, *FLAGS, "--prompt", "fox").out in chat.out


# --- batch ---


@pytest.fixture
def prompts(tmp_path) -> pathlib.Path:
    path = tmp_path / "in.jsonl"
    lines = [{"id": 1, "prompt": PROMPT}, {"id": 2, "messages": [{"role": "user", "content": PROMPT + "."}]}]
    path.write_text("\n".join([*map(json.dumps, lines), "not JSON"]))
    return path


def test_a_batch_and_its_summary(run, model, prompts, tmp_path):
    base = ("batch", "--model", model, *FLAGS, "--input", prompts)
    result = run(*base, "--output", tmp_path / "out.jsonl", "--json")
    assert (result.code, result.err) == (0, "")
    summary = result.json
    assert summary.pop("seconds") > 0
    assert summary == {
        "output": str(tmp_path / "out.jsonl"),
        "num_answered": 2,
        "num_errors": 1,
        "num_prompt_tokens": 117,
        "num_cached_tokens": 0,
        "num_generated_tokens": 24,
        "num_before": 0,
    }
    answers = {line["id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "not JSON" in answers["line-3"]["error"]["message"]
    for id, prompt in ((1, PROMPT), (2, PROMPT + ".")):
        one = run("generate", "--model", model, *FLAGS, "--prompt", prompt, "--json").json
        assert answers[id] == {"id": id} | {key: one[key] for key in ("text", "finish_reason", "usage")}

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    more = ("--chart", tmp_path / "chart.html", "--profile", tmp_path / "profile", "--metrics-port", port)
    first, rest = prompts.read_bytes().split(b"\n", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl.gz").write_bytes(gzip.compress(first + b"\n"))
    (tmp_path / "data" / "b.jsonl").write_bytes(rest)
    files = (*base[:-1], tmp_path / "data")
    result = run(*files, "--output", tmp_path / "again.jsonl", *more)
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()
    assert "polyline" in (tmp_path / "chart.html").read_text() and "running requests" in result.err
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert result.out.startswith("2 answered, 1 with an error; 117 prompt tokens and 24 generated tokens in ")
    assert "answered 3/3; 0:0" in result.err


def test_a_configuration_file_and_a_mesh(run, model, prompts, tmp_path):
    """Overrides take precedence over the file, flags over both."""
    config = pathlib.Path(__file__).parent.parent / "configs" / "batch.py"
    base = ("batch", "--config", f"{config}:{model}", "--dtype", "float32", "--input", prompts, "--json")
    overrides = ("--config.sampling.max_new_tokens=4", "--config.mesh=data=2,fsdp=2,tensor=2", "--max-new-tokens", "3")
    result = run(*base, *overrides, "--output", tmp_path / "out.jsonl")
    assert (result.code, result.json["num_generated_tokens"]) == (0, 6)


def test_results_are_not_overwritten_by_default(run, model, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    base = ("batch", "--model", model, *FLAGS, "--input", prompts, "--output", output)
    refused = run(*base)
    assert (refused.code, len(refused.err.splitlines())) == (1, 1)
    assert "holds results already" in refused.err
    lost = run(*base, "--overwrite", "--model", "no/such/model")
    assert (lost.code, output.read_text()) == (1, "old\n")
    assert run(*base, "--overwrite").code == 0
    assert len(output.read_text().splitlines()) == 3


def test_a_run_is_resumed(run, model, prompts, tmp_path):
    """First a truncated result is answered again; then results are sorted in input order; then only errors are retried."""
    output = tmp_path / "out.jsonl"
    base = ("batch", "--model", model, *FLAGS, "--input", prompts, "--output", output, "--json")
    assert run(*base).code == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.rindex(b"{")])
    result = run(*base, "--keep-order")
    assert (result.code, result.json["num_before"], result.json["num_answered"] + result.json["num_errors"]) == (0, 2, 1)
    lines = output.read_bytes().splitlines(keepends=True)
    assert sorted(lines) == sorted(whole.splitlines(keepends=True))
    assert [json.loads(line)["id"] for line in lines] == [1, 2, "line-3"]
    assert {key: run(*base).json[key] for key in ("num_before", "num_answered", "num_errors")} == {
        "num_before": 3,
        "num_answered": 0,
        "num_errors": 0,
    }
    assert run(*base, "--retry-errors").json["num_errors"] == 1
    assert output.read_bytes().splitlines(keepends=True) == lines
    refused = run(*base, "--max-new-tokens", "3")
    assert refused.code == 1 and "sampling.max_new_tokens was 12 and is now 3" in refused.err
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["is_complete"] and manifest["settings"]["sampling"]["max_new_tokens"] == 12


@pytest.mark.parametrize(
    ("input", "output", "code", "expected"),
    [
        ("in.jsonl", "in.jsonl", 2, "is the same as --output"),
        ("missing.jsonl", "out.jsonl", 2, "--input cannot be read: there is no file"),
        ("in.jsonl", "missing/out.jsonl", 2, "there is no directory"),
        ("in.jsonl", "/dev/full", 1, "No space left on device; the 0 results so far are complete: free some disk space"),
    ],
)
def test_files_that_cannot_be_used(run, model, prompts, tmp_path, input, output, code, expected):
    before = prompts.read_text()
    files = ("--input", tmp_path / input, "--output", tmp_path / output)
    result = run("batch", "--model", model, *FLAGS, *files, "--overwrite", "--json")
    assert (result.code, result.out, len(result.err.splitlines())) == (code, "", 1)
    assert result.err.startswith("qwen-dist batch: ") and expected in result.err
    assert prompts.read_text() == before


# --- errors ---


def _remove(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def _change(name, **values):
    return lambda directory: changed(directory, name, **values)


def _split(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Store the weights in two shards with an index, as in large checkpoints."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, half in zip(shards, halves, strict=True):
        safetensors.numpy.save_file({name: tensors[name] for name in half}, directory / shard)
    weight_map = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory / shards[0], directory / shards[1]


def _lose_shard(directory):
    _split(directory)[1].unlink()


def _cut_shard(directory):
    shard = _split(directory)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose_tensor(directory):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.surprise.weight"] = tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_remove("config.json", "tokenizer.json"), ["has no tokenizer.json, config.json", "whole checkpoint"]),
        (_change("config.json", model_type="llama"), ["model_type 'llama' is not supported yet", "qwen2, qwen3"]),
        (_change("config.json", logit_scale=2.0), ["logit_scale = 2.0", "--config.model.ignored_config_keys=logit_scale"]),
        (_change("config.json", vocab_size=300), ["embed_tokens.weight", "300", "344"]),
        (lambda directory: (directory / "generation_config.json").write_text("{"), ["generation_config.json", "JSON"]),
        (_remove("model.safetensors"), ["has no safetensors file"]),
        (_lose_shard, ["model-00002-of-00002.safetensors"]),
        (_cut_shard, ["model-00002-of-00002.safetensors"]),
        (_lose_tensor, ["norm.weight", "surprise"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_checkpoints_that_cannot_be_used(run, tiny_directory, damage, expected):
    directory = tiny_directory("qwen3", **SIZES)
    damage(directory)
    result = run("generate", "--model", directory, *FLAGS, "--prompt", PROMPT)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("qwen-dist generate: ")
    for text in expected:
        assert text in result.err


def test_sharded_weights_give_the_same_answer(run, model, tiny_directory):
    directory = tiny_directory("qwen3", {"repetition_penalty": 1.1}, **SIZES)
    _split(directory)
    arguments = (*FLAGS, "--prompt", PROMPT, "--json")
    assert run("generate", "--model", directory, *arguments) == run("generate", "--model", model, *arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "no/such/directory",
            "is neither a directory nor a hub id such as Qwen/Qwen3-0.6B(.*)address. Pass --model",
        ),
        ("Qwen/No-Such-Model", "cannot be opened on the hub (.*). Without a network, pass --model the directory"),
    ],
)
def test_models_that_do_not_exist(run, tmp_path, monkeypatch, name, expected):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = run("generate", "--model", name, "--prompt", PROMPT)
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert result.err.startswith(f"qwen-dist generate: {name!r}" if name.count("/") > 1 else f"qwen-dist generate: {name}")
    for text in expected.split("(.*)"):
        assert text in result.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mesh", "tensor=16"], "mesh tensor=16 needs 16 devices and there are 8"),
        (["--mesh", "model=2"], "'model' is not an axis; axes are data, fsdp, expert, context, tensor"),
        (["--mesh", "tensor=3"], "which the 3 shards of tensor do not divide"),
        (["--num-cpu-devices", "0"], "--num-cpu-devices 0: give at least 1"),
        (["--dtype", "float16"], "model.dtype is 'float16'; it must be 'bfloat16' or 'float32' or 'float64'"),
        (["--temperature", "-1", "--top-p", "2"], "temperature is -1.0; it must be 0 or more; top_p is 2.0"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--logprobs", "21"], "logprobs is 21; it must be 0 to 20"),
        (["--stop", ""], "stop is ('',); it must be non-empty strings"),
        (["--bogus", "--also"], "unknown argument --bogus --also"),
        (["--config", "no/such.py"], "there is no file no/such.py"),
        (["--config.sampling.top_q=1", "--config.sampling.seed=x"], "did you mean sampling.top_p?"),
        (["--config.sampling.top_q=1", "--config.sampling.seed=x"], "sampling.seed is 'x'; it must be int or None"),
    ],
)
def test_wrong_usage_exits_with_2(run, model, arguments, expected):
    result = run("generate", "--model", model, "--prompt", PROMPT, *arguments)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err


def test_a_command_and_a_model_are_required(run):
    assert run().code == run("genrate").code == 2
    missing = run("finetune", "--data", "x.jsonl", "--output", "x")
    assert (missing.code, "model.path is missing" in missing.err) == (2, True)
    missing = run("generate", "--model", "x", "--json", terminal=True)
    assert (missing.code, "--json needs --prompt" in missing.err) == (2, True)


def test_a_prompt_longer_than_the_context(run, model):
    result = run("generate", "--model", model, *FLAGS, "--prompt", "a " * 2000)
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert "tokens and the model's context 2048" in result.err and "shorten the prompt" in result.err
    empty = run("generate", "--model", model, *FLAGS, "--raw", "--prompt", "")
    assert (empty.code, "the prompt is empty" in empty.err) == (1, True)


def test_debug_shows_the_traceback(model):
    with pytest.raises(ValueError, match="is not an axis"):
        main(["generate", "--model", str(model), "--prompt", "x", "--mesh", "model=2", "--debug"])


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert len(result.out.splitlines()) <= 65
    assert max(map(len, result.out.splitlines())) <= 124
    assert "example" in result.out and f"  qwen-dist {command} " in result.out
    assert f"\n    {command}" in run("--help").out


def test_version(run, monkeypatch):
    """It says which kernels there are, and it is fast because it imports no jax (see test_imports)."""
    import qwen_dist
    from qwen_dist.ops import native_library

    versions = f"qwen-dist {qwen_dist.__version__} (jax {importlib.metadata.version('jax')}; "
    assert run("--version") == (0, f"{versions}{native_library.describe_kernels()})\n", "")
    for build in native_library.available_builds():
        monkeypatch.setenv("QWEN_DIST_CPU", build)
        assert f"; CPU kernels: {build})" in run("--version").out
    monkeypatch.setenv("QWEN_DIST_CPU", "plain")
    assert "no CPU kernels: " in run("--version").out
    monkeypatch.setenv("QWEN_DIST_CPU", "sse2")
    result = run("--version")
    assert result.code == 2 and "QWEN_DIST_CPU=sse2: there is no such build" in result.err and "plain" in result.err
    monkeypatch.setattr(native_library, "load", lambda: None)
    assert run("--version").out == f"{versions}no CPU kernels: they were not compiled, XLA does the work)\n"


# --- every field of the configuration changes something ---


def _fields(cls, prefix: str = "") -> list[str]:
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names += _fields(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


# A run that samples; the changed value of each field. None: the test changes it itself.
PERTURBED = {
    "model.path": None,
    "model.dtype": "bfloat16",
    "model.load_format": "dummy",
    "model.ignored_config_keys": None,
    "model.host_memory_budget": "1B",
    "model.quantize": None,  # below, in groups that divide this model's weights
    "model.quantize_group_size": None,
    "model.quantize_head": None,
    "model.kv_cache_dtype": "int8",
    "model.adapter": "no-such-directory",
    "input": None,
    "output": None,
    "mesh": "tensor=16",
    "num_replicas": "2",
    "sampling.max_new_tokens": "3",
    "sampling.temperature": "0",
    "sampling.top_k": "1",
    "sampling.top_p": "1e-6",
    "sampling.min_p": "1.0",
    "sampling.repetition_penalty": "0.01",
    "sampling.seed": "1",
    "sampling.stop": None,
    "sampling.logprobs": "1",
    "chat.thinking": "off",
    "chat.template_args": "('enable_thinking=false',)",
    "sampling.presence_penalty": "-2",
    "sampling.frequency_penalty": "-2",
    "sampling.min_new_tokens": "-1",
    "engine.policy": None,
    "engine.max_batch_size": "1",
    "raw": "true",
    "overwrite": "true",
    "retry_errors": None,  # has its own test, like keep_order
    "keep_order": None,
    "engine.kv_cache_memory": "1KB",
    "engine.steps_per_dispatch": "0",
    "engine.prefix_cache": None,  # changes no answer
    "engine.snapshot_fraction": "1",
    "max_line_size": "10B",
    "metrics_port": "70000",
    "metrics_host": None,  # has its own test
    "profile": "/dev/null/profile",
    "chart": "no-such-directory/chart.html",
}


@pytest.mark.slow
def test_every_field_of_the_configuration_changes_something(run, model, tiny_directory, tmp_path):
    assert sorted(PERTURBED) == sorted(_fields(BatchConfig))
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # The longer prompt is finished first with a batch size of 1, and last when both run together.
    records = [{"id": 1, "prompt": PROMPT, "max_new_tokens": 7}, {"id": 2, "prompt": PROMPT + "."}]
    input.write_text("\n".join(map(json.dumps, records)))
    base = {"model.path": model, "model.dtype": "float32", "input": input, "output": output}
    # Log-probabilities show changes that are too small to change a token.
    base |= {"sampling.max_new_tokens": 12, "sampling.temperature": 1, "sampling.logprobs": 0}

    def outcome(**changes) -> tuple[int, str, str]:
        for file in tmp_path.glob("out.jsonl*"):
            file.unlink()
        values = base | changes
        result = run("batch", *(f"--config.{key}={value}" for key, value in values.items()))
        return result.code, result.err if result.code else "", output.read_text() if output.exists() else ""

    before = outcome()
    assert before[0] == 0 and len(before[2].splitlines()) == 2
    assert outcome() == before  # otherwise every field would seem to change something
    for field, value in PERTURBED.items():
        if value is not None and field != "overwrite":
            assert outcome(**{field: value}) != before, field

    # With one request at a time, latency answers the first record first.
    assert outcome(**{"engine.max_batch_size": "1", "engine.policy": "latency"}) != outcome(
        **{"engine.max_batch_size": "1"}
    )
    in_int4 = {"model.quantize": "int4", "model.quantize_group_size": "8"}
    outcomes = [before, *(outcome(**in_int4 | more) for more in ({}, {"model.quantize_group_size": "0"}))]
    outcomes.append(outcome(**in_int4, **{"model.quantize_head": "true"}))
    assert len(set(outcomes)) == 4 and all(code == 0 for code, *_ in outcomes), outcomes
    other = tiny_directory("qwen3", **SIZES, initializer_range=0.3)
    assert outcome(**{"model.path": other}) != before
    odd = tiny_directory("qwen3", {"repetition_penalty": 1.1}, **SIZES)
    changed(odd, "config.json", my_note=1)
    assert outcome(**{"model.path": odd})[0] == 1
    assert outcome(**{"model.path": odd, "model.ignored_config_keys": "other, my_note"}) == before
    short = tmp_path / "short.jsonl"
    short.write_text(input.read_text().splitlines()[0])
    assert outcome(input=short) != before
    assert outcome(output=tmp_path / "elsewhere.jsonl") != before
    assert (tmp_path / "elsewhere.jsonl").read_text() == before[2]
    seen = json.loads(before[2].splitlines()[0])["text"]
    assert outcome(**{"sampling.stop": (seen[2:4],)}) != before
    again = ["batch", *(f"--config.{key}={value}" for key, value in base.items())]
    output.with_name("out.jsonl.journal").unlink()
    output.write_text("old\n")
    assert run(*again).code == 1 and output.read_text() == "old\n"
    assert run(*again, "--config.overwrite=true").code == 0 and output.read_text() == before[2]


# --- as a process ---


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function (*arguments) -> the command line in a new process."""
    home = tmp_path_factory.mktemp("home")

    def start(*arguments) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        command = [sys.executable, "-m", "qwen_dist.cli", *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment | {"HOME": str(home)}, **pipes)

    start.home = home
    return start


def test_cpu_devices_and_the_compilation_cache(run, start, model):
    """With float64, which is a setting of the process."""
    arguments = ("generate", "--model", model, *FLAGS, "--prompt", PROMPT, "--json")
    process = start(*arguments, "--num-cpu-devices", "4", "--mesh", "fsdp=2,tensor=2", "--dtype", "float64")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out) == run(*arguments).json
    assert any((start.home / ".cache/qwen_dist/compiled").iterdir())


def test_an_interrupt_shows_no_traceback(start, model):
    long = ("--max-new-tokens", "1900", "--temperature", "3", "--dtype", "float32")
    process = start("generate", "--model", model, "--prompt", PROMPT, *long)
    assert process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, b"interrupted\n")


def test_a_closed_pipe_shows_no_traceback(start, model):
    process = start("generate", "--model", model, *FLAGS, "--prompt", PROMPT)
    process.stdout.close()
    assert process.wait(timeout=300) == 1
    assert process.stderr.read() == b""
