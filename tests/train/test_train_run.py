"""Whole runs: their output, and that an interrupted and resumed run is identical to an uninterrupted one."""

import dataclasses
import gzip
import json
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from chat_templates import CHATML
from short_run import short_run

from qwen_dist.cli import main
from qwen_dist.config import FinetuneConfig, ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request
from qwen_dist.errors import UserError
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.run import prepare, train

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
STEPS = 8


@pytest.fixture(scope="module")
def model(tiny_directory):
    return tiny_directory("qwen3", **SIZES)


@pytest.fixture(scope="module")
def config(model, chats):
    """A function (output, **changes) -> configuration of a short run; `__` in a change's key is a dot."""
    usual = {"model.dtype": "float32", "optimizer.learning_rate": 3e-3, "steps": STEPS, "save_every": 2}

    def config(output, **changes) -> FinetuneConfig:
        named = {key.replace("__", "."): value for key, value in changes.items()}
        return short_run(model, chats, output, usual | named)

    return config


def run(config: FinetuneConfig, stop_after: int | None = None):
    """Run; after step `stop_after` the process sends itself SIGTERM, and one more step is done."""

    def callback(metrics):
        if metrics.step == stop_after:
            signal.raise_signal(signal.SIGTERM)

    return train(prepare(config), callback=callback)


def metrics_of(output) -> list[dict]:
    entries = [json.loads(line) for line in (pathlib.Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def saved_state(output, step: int):
    """All arrays of a checkpoint as stored on disk, and the position in the data."""
    folder = pathlib.Path(output).absolute() / "checkpoints" / str(step)
    state = orbax.checkpoint.StandardCheckpointer().restore(folder / "state")
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return leaves, json.loads((folder / "position" / "metadata").read_text())


def assert_identical(one, other, step: int = STEPS):
    (leaves, position), (others, other_position) = saved_state(one, step), saved_state(other, step)
    assert leaves.keys() == others.keys() and len(leaves) > 3
    assert all(leaf.tobytes() == others[name].tobytes() for name, leaf in leaves.items())
    assert position == other_position
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def uninterrupted(request, config, tmp_path_factory):
    """The method and output of a run without interruption."""
    output = tmp_path_factory.mktemp("uninterrupted")
    summary = run(config(output, method=request.param))
    assert (summary.steps, summary.is_stopped) == (STEPS, False)
    return request.param, output


def test_a_run_lowers_the_loss_and_writes_its_metrics(uninterrupted):
    method, output = uninterrupted
    entries = metrics_of(output)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.1
    assert {"loss", "gradient_norm", "learning_rate", "num_tokens"} <= entries[0].keys()
    assert "<svg" in (output / "loss.html").read_text()
    assert sorted(int(path.name) for path in (output / "checkpoints").iterdir()) == [6, 8], "the newest two"
    assert (output / {"lora": "adapter", "full": "model"}[method]).is_dir()


def test_a_stopped_and_resumed_run_is_identical(uninterrupted, config, tmp_path):
    method, output = uninterrupted
    summary = run(config(tmp_path, method=method), stop_after=2)
    assert (summary.steps, summary.is_stopped) == (3, True)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "model").exists()
    assert run(config(tmp_path, method=method)).steps == STEPS
    assert_identical(tmp_path, output)
    for file in (output / {"lora": "adapter", "full": "model"}[method]).glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.relative_to(output)).read_bytes()


def killed_at_random(config, times: int, rng) -> list[tuple[int, int]]:
    """Start the run in a process `times` times and kill each at a random moment, the first early and the last late.

    Returns, for each, the step after which it resumed and the last step that it reported.
    """
    program = f"""
import json
from qwen_dist.config import FinetuneConfig, bind_config
from qwen_dist.train.run import prepare, train
config = bind_config(FinetuneConfig, json.loads({json.dumps(dataclasses.asdict(config))!r}))
train(prepare(config), callback=lambda metrics: print(metrics.step, flush=True))
"""
    killed = []
    for number in range(times):
        last = (number + rng.random()) / times * 0.95 * config.steps
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        limit = threading.Timer(300, process.kill)  # then there is no next line, and the test fails
        limit.start()
        steps = [int(process.stdout.readline())]
        while steps[-1] < last:
            steps.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0, 0.05))  # a step takes about 10 ms, a save longer: kill in one of them
        process.kill()
        limit.cancel()
        steps += map(int, process.communicate()[0].split())
        killed.append((steps[0] - 1, steps[-1]))
    return killed


@pytest.mark.slow
@pytest.mark.parametrize(("method", "times"), [("lora", 10), ("full", 10)])
def test_kill_9_changes_nothing(config, tmp_path, method, times):
    steps = 60 * times
    changes = {"method": method, "steps": steps, "save_every": 7}
    run(config(tmp_path / "uninterrupted", **changes))
    cut_off = config(tmp_path / "cut_off", **changes)
    killed = killed_at_random(cut_off, times, random.Random(0))
    print("kill  resumed after step  killed after step")
    for number, (begun, ended) in enumerate(killed, 1):
        print(f"{number:4}  {begun:18}  {ended:17}")
    assert killed[-1][1] < steps, "all were killed before the end"
    run(cut_off)
    assert_identical(tmp_path / "uninterrupted", tmp_path / "cut_off", step=steps)


@pytest.mark.parametrize(
    "meshes", [("data=1", "fsdp=2,tensor=2"), pytest.param(("fsdp=4", "data=2"), marks=pytest.mark.slow)]
)
def test_a_run_resumes_on_another_mesh(config, tmp_path, meshes):
    first, second = meshes
    changes = {"method": "full", "data__packing": False}
    run(config(tmp_path / "one", mesh="data=1", **changes))
    run(config(tmp_path / "two", mesh=first, **changes), stop_after=3)
    run(config(tmp_path / "two", mesh=second, **changes))
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [entry["num_tokens"] for entry in one] == [entry["num_tokens"] for entry in two], "the same batches"
    np.testing.assert_allclose([e["loss"] for e in one], [e["loss"] for e in two], rtol=1e-6)


def test_the_result_gives_the_same_text_in_transformers(uninterrupted, config, model, tmp_path, capsys):
    """An adapter in peft, with `--adapter` and merged by `export`, or a full model: the same greedy text."""
    method, output = uninterrupted
    if method == "full":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
        ours = ["--model", str(output / "model")]
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
        ours = ["--model", str(model), "--adapter", str(output / "adapter")]
        assert main(["export", *ours, "--output", str(tmp_path / "merged")]) == 0
        for name, value in safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors").items():
            np.testing.assert_allclose(value, theirs.state_dict()[name].numpy(), rtol=0, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = "the quick brown fox jumps over"
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = theirs.generate(tokens, do_sample=False, max_new_tokens=12)[0, tokens.shape[1] :]
    untrained = transformers.AutoModelForCausalLM.from_pretrained(model)
    before = untrained.generate(tokens, do_sample=False, max_new_tokens=12)[0, tokens.shape[1] :]
    capsys.readouterr()
    flags = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "12", "--mesh", "data=1", "--raw", "--json"]
    assert main(["generate", *ours, *flags, "--prompt", prompt]) == 0
    found = json.loads(capsys.readouterr().out)["token_ids"]
    assert found == expected.tolist() and found != before.tolist()


def test_a_base_model_that_is_trained_on_chats_ends_its_answers(tiny_directory, tmp_path):
    """Its texts end with another token than its chat template ends turns with."""
    base = tiny_directory("qwen3", **SIZES)
    tokenizer = Tokenizer.open(base)
    end, im_end = (tokenizer.special_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "max_new_tokens": 5}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "chat_template": CHATML}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "lazy dog"}] * 2
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}))
    changes = {"model.dtype": "float32", "optimizer.learning_rate": 3e-2, "steps": 25, "batch_size": 1, "method": "full"}
    run(short_run(base, tmp_path / "chat.jsonl", tmp_path / "run", changes))

    trained = tmp_path / "run" / "model"
    assert json.loads((trained / "generation_config.json").read_text()) == {
        "eos_token_id": [end, im_end],
        "max_new_tokens": 5,
    }
    prompt = Tokenizer.open(base).render_chat(turns[:1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    inputs = transformers.AutoTokenizer.from_pretrained(trained)(prompt, return_tensors="pt")
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :].tolist()
    engine, tokenizer, sampling = open_engine(ModelOptions(str(trained), dtype="float32"), "data=1", SamplingOptions())
    *_, last = updates = list(engine.run([Request(None, tuple(tokenizer.encode(prompt)), sampling)]))
    assert "".join(update.text for update in updates) == "lazy dog" and last.finish_reason == "stop"
    assert [token for update in updates for token in update.tokens] == expected


def test_an_adapter_is_trained_further(uninterrupted, config, tmp_path):
    method, output = uninterrupted
    if method == "full":
        pytest.skip("no adapter")
    before = metrics_of(output)
    run(config(tmp_path / "further", model__adapter=str(output / "adapter"), steps=1))
    assert metrics_of(tmp_path / "further")[0]["loss"] < before[1]["loss"]
    run(config(tmp_path / "merged", model__adapter=str(output / "adapter"), steps=1, method="full"))
    np.testing.assert_allclose(
        metrics_of(tmp_path / "merged")[0]["loss"], metrics_of(tmp_path / "further")[0]["loss"], rtol=1e-6
    )


def test_evaluation_and_the_best_checkpoint(config, chats, tmp_path):
    rates = {"optimizer__learning_rate": 0.5, "optimizer__schedule": "constant", "optimizer__clip_norm": 0.0}
    options = {"data__eval_files": (str(chats),), "eval_every": 2, "max_to_keep": 1, "keep_best": True, "tensorboard": True}
    summary = run(config(tmp_path, **options, **rates))
    losses = {entry["step"]: entry["eval_loss"] for entry in metrics_of(tmp_path) if "eval_loss" in entry}
    assert list(losses) == [2, 4, 6, 8] and summary.eval_loss == losses[8]
    best = min(losses, key=losses.__getitem__)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best, 8}
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_other_optimizers_lower_the_loss(config, tmp_path, name):
    run(config(tmp_path, method="full", optimizer__name=name, mesh="fsdp=2,tensor=2"))
    entries = metrics_of(tmp_path)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.1


def test_a_non_finite_loss_stops_the_run(config, tmp_path):
    with pytest.raises(UserError, match=r"step \d: the loss is .* there is no checkpoint") as error:
        run(config(tmp_path, optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, save_every=0, method="full"))
    step = int(str(error.value).split()[1].rstrip(":"))
    assert np.load(tmp_path / f"batch-{step}.npz")["tokens"].shape == (4, 64)


def test_a_run_with_another_fingerprint_is_not_resumed(uninterrupted, config):
    method, output = uninterrupted
    with pytest.raises(
        UserError, match=r"another run:\n  - data.seed was 0 and is now 1\n  - optimizer.b1 was 0.9 and is now 0.8"
    ):
        run(config(output, method=method, optimizer__b1=0.8, data__seed=1))


def test_the_command_line(model, chats, tmp_path, capsys):
    base = [
        "finetune",
        "--model",
        str(model),
        "--data",
        str(chats),
        "--output",
        str(tmp_path / "out"),
        "--dtype",
        "float32",
    ]
    base += ["--config.data.max_length=64", "--config.lora.rank=4", "--batch-size", "4", "--mesh", "data=1"]
    assert main([*base, "--show-data", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{chats}:1 " in shown and "<|im_start|>assistant⏎" in shown
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(pathlib.Path(chats).read_bytes()))
    patterns = [f"{tmp_path}/*.gz" if argument == str(chats) else argument for argument in base]
    assert main([*patterns, "--show-data", "1"]) == 0
    one_line, again = (
        "".join(text.split()) for text in (shown, capsys.readouterr().out)
    )  # where lines wrap depends on the path
    assert again == one_line.replace(str(chats), str(packed))
    assert main([*base, "--dry-run"]) == 0
    assert "layers.{0-1}.self_attn.q_proj.lora_A.weight [4, 32] float32 × 2" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*base, "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == str(tmp_path / "out" / "adapter")
    assert main([*base, "--config.data.packing=3"]) == 2
    assert "data.packing is '3'; it must be bool" in capsys.readouterr().err


def test_sigterm_is_exit_code_75(model, chats, tmp_path):
    command = [sys.executable, "-m", "qwen_dist.cli", "finetune", "--model", str(model), "--data", str(chats)]
    command += ["--output", str(tmp_path), "--dtype", "float32", "--config.data.max_length=64", "--steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped and saved after step" in out and "the same command resumes the run" in out
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
