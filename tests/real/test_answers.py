"""The real checkpoint gives the same answers as transformers, on one device and on meshes, alone and in a batch."""

import gc
import pathlib

import pytest
import torch
import transformers

from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams

pytestmark = pytest.mark.real

QUESTION = "Write a Python function that checks whether a number is prime."
NUM_NEW = 24


def question_ids(tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}]))


def answer(engine: Engine, prompts, params: SamplingParams) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    for update in engine.run([Request(index, prompt, params) for index, prompt in enumerate(prompts)]):
        tokens[update.request.key] += update.tokens
    return tokens


@pytest.fixture(scope="module")
def expected(real_checkpoint: pathlib.Path) -> tuple[tuple[int, ...], list[int]]:
    """The prompt and transformers' answer: greedy, with the repetition penalty of generation_config.json."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=NUM_NEW)
    num_prompt = ids["input_ids"].shape[1]
    return tuple(ids["input_ids"][0].tolist()), out[0, num_prompt:].tolist()


@pytest.mark.parametrize(
    "mesh",
    [
        "",
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tensor=2", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")),
    ],
)
def test_the_answer_is_transformers_token_for_token(real_checkpoint, expected, mesh):
    prompt, tokens = expected
    gc.collect()  # 2 GB of the test before
    engine, tokenizer, params = open_engine(
        ModelOptions(str(real_checkpoint), dtype="float32"),
        mesh,
        SamplingOptions(temperature=0.0, max_new_tokens=NUM_NEW),
        max_batch_size=1,
    )
    assert params.repetition_penalty == 1.1
    assert question_ids(tokenizer) == prompt
    assert len(tokens) == NUM_NEW or tokens[-1] in tokenizer.stop_ids
    assert answer(engine, [prompt], params) == [tokens]
    assert "def is_prime" in tokenizer.decode(tokens)


@pytest.mark.slow
def test_32_prompts_are_each_answered_as_if_alone(real_checkpoint):
    """From 1 to 700 tokens: the batch needs every size that programs are compiled for."""
    engine, tokenizer, _ = open_engine(
        ModelOptions(str(real_checkpoint), dtype="float32"), "", SamplingOptions(), max_batch_size=32
    )
    code = tokenizer.encode((pathlib.Path(__file__).parent.parent / "conftest.py").read_text())
    prompts = [tuple(code[7 * index : 7 * index + 1 + (index * index * 7) // 10]) for index in range(32)]
    params = SamplingParams(max_new_tokens=16, repetition_penalty=1.1)
    together = answer(engine, prompts, params)
    assert {len(prompt) for prompt in prompts} >= {1, 673}
    for prompt, tokens in zip(prompts, together, strict=True):
        assert answer(engine, [prompt], params) == [tokens]
