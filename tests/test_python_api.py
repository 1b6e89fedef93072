"""The Python door: what `import qwen_dist` gives, as a contract, against transformers and peft."""

import inspect
import subprocess
import sys

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import qwen_dist
from qwen_dist import DEMO_MODEL, LLM, LoraOptions, SamplingParams, Tokenizer, TrainBatch, UserError, load_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# The arguments of every public function, in order: a change breaks programs of users.
SIGNATURES = {
    "LLM": "model mesh dtype adapter quantize quantize_group_size quantize_head kv_cache_dtype load_format "
    "ignored_config_keys max_batch_size kv_cache_memory policy steps_per_dispatch prefix_cache devices progress",
    "LLM.generate": "self prompts sampling_params changes",
    "LLM.chat": "self messages sampling_params tools template_variables changes",
    "LLM.stream": "self prompt sampling_params template_variables changes",
    "LLM.score": "self texts",
    "LLM.embed": "self texts dimensions",
    "LLM.encode": "self text",
    "LLM.decode": "self token_ids",
    "load_model": "model mesh rules dtype load_format ignored_config_keys progress",
    "new_model": "config mesh rules dtype seed",
    "CausalLM.__call__": "self tokens_BT positions_BT segments_BT",
    "CausalLM.logits": "self parameters tokens_BT positions_BT segments_BT",
    "CausalLM.loss": "self parameters batch remat",
    "CausalLM.loss_and_gradient": "self trained batch frozen remat",
    "CausalLM.module": "self parameters",
    "CausalLM.shard": "self batch",
    "CausalLM.with_lora": "self options",
    "CausalLM.save_pretrained": "self directory parameters",
    "TrainBatch.from_sequences": "sequences loss_masks length",
    "finetune": "config callback log",
    "Tokenizer.open": "model ignored_keys",
}


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO_MODEL, dtype="float32", max_batch_size=4)


@pytest.fixture(scope="module")
def model():
    return load_model(DEMO_MODEL, mesh="data=1", dtype="float32")


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    place = qwen_dist
    for part in name.split("."):
        place = getattr(place, part)
    assert " ".join(inspect.signature(place).parameters) == SIGNATURES[name]
    assert inspect.getdoc(place)


def test_every_public_name_is_there_and_no_other():
    assert all(hasattr(qwen_dist, name) for name in qwen_dist.__all__)
    assert set(qwen_dist.__all__) == {"DEMO_MODEL", *qwen_dist._NAMES}
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = qwen_dist.LMM


def test_importing_imports_nothing_else():
    code = "import sys, qwen_dist; print(sorted({'jax', 'numpy', 'tokenizers', 'ml_collections'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_greedy_answers_are_transformers(llm, reference):
    tokenizer = Tokenizer.open(DEMO_MODEL)
    prompts = ["The sky is", "One, two, three, four"]
    answers = llm.generate(prompts, temperature=0, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.encode(prompt)
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        assert answer.prompt_token_ids == tuple(ids) and answer.token_ids == tuple(expected[: len(answer.token_ids)])
        assert answer.text == llm.decode([id for id in answer.token_ids if id not in tokenizer.stop_ids])
    assert llm.generate(llm.encode(prompts[0]), temperature=0, max_new_tokens=12) == answers[:1]


def test_chats_streams_and_parameters_for_each_prompt(llm):
    (answer,) = llm.chat(QUESTION, temperature=0)
    assert answer.text == "The capital of France is Paris." and answer.finish_reason == "stop"
    assert "".join(llm.stream(QUESTION, temperature=0)) == answer.text
    short, long = llm.chat([QUESTION, QUESTION], [SamplingParams(max_new_tokens=2), SamplingParams(logprobs=1)])
    assert short.finish_reason == "length" and len(short.token_ids) == 2
    assert long.text == answer.text
    assert [one.token for one in long.logprobs] == list(long.token_ids[:-1])


def test_scores_are_transformers(llm, reference):
    (score,) = llm.score("The capital of France is Paris.")
    ids = torch.tensor([score.token_ids])
    with torch.no_grad():
        expected = reference(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)


def test_a_stream_that_is_left_gives_the_engine_back(llm):
    stream = llm.stream("One, two,", temperature=0, max_new_tokens=50)
    next(stream)
    with pytest.raises(UserError, match="is answering another call"):
        llm.generate("x")
    stream.close()
    assert llm.generate("One, two,", max_new_tokens=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("x", temprature=1), "temprature is not a sampling parameter"),
        (lambda llm: llm.generate("x", temperature=-1), "temperature is -1; it must be 0 or more"),
        (lambda llm: llm.generate(["x", "y"], [SamplingParams()]), "2 prompts and 1 sampling parameters"),
        (lambda llm: llm.generate(""), "the prompt is empty"),
        (lambda llm: llm.generate([[1, 2], [10**6]]), "token ids outside the vocabulary"),
        (lambda llm: llm.chat([{"role": "robot", "content": "x"}]), "role"),
        (lambda llm: LLM("no/such model"), "is neither a directory nor a hub id"),
        (lambda llm: LLM(DEMO_MODEL, dtype="float64"), "jax_enable_x64"),
        (lambda llm: load_model(DEMO_MODEL, mesh="tensor=64"), "needs 64 devices"),
    ],
)
def test_errors_are_one_sentence(llm, call, message):
    with pytest.raises(UserError, match=message):
        call(llm)


def test_logits_loss_and_gradient_are_pytorchs(model, reference):
    sequences = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    logits = model(np.array([sequences[0]]))
    with torch.no_grad():
        np.testing.assert_allclose(logits, reference(torch.tensor([sequences[0]])).logits, atol=2e-4)
    batch = model.shard(TrainBatch.from_sequences(sequences, [[1, 0, 1, 1, 1, 1], [1, 1, 1]]))
    loss, gradient = jax.jit(model.loss_and_gradient)(model.parameters, batch)
    labels = [[5, -100, 7, 8, 9, 10], [11, 12, 13]]
    counts = [4, 2]
    losses = [
        reference(torch.tensor([ids]), labels=torch.tensor([label])).loss * count
        for ids, label, count in zip(sequences, labels, counts, strict=True)
    ]
    expected = sum(losses) / sum(counts)
    reference.zero_grad()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["norm.weight"], reference.model.norm.weight.grad, atol=1e-5)


def test_what_is_saved_loads_in_transformers_and_peft(model, reference, tmp_path):
    tokens = [[5, 6, 7, 8, 9, 10]]
    scaled = {name: value * 1.5 if name == "norm.weight" else value for name, value in model.parameters.items()}
    model.save_pretrained(tmp_path / "model", scaled)
    with torch.no_grad():
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        np.testing.assert_allclose(saved(torch.tensor(tokens)).logits, model(tokens) * 1.5, atol=1e-3)
    with_adapter, names = model.with_lora(LoraOptions(rank=2, target_modules=("q_proj", "down_proj")))
    trained = {name: value + 0.05 for name, value in with_adapter.parameters.items() if name in names}
    with_adapter.save_pretrained(tmp_path / "adapter", with_adapter.parameters | trained)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits
    found = with_adapter.logits(with_adapter.parameters | trained, np.array(tokens))
    assert np.abs(found - model(tokens)).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-3)
    adapted.unload()
