"""Mixtures of experts through the engine: the tokens that transformers chooses, on one device and with experts spread."""

import pytest
import torch
import transformers

from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request

PROMPTS = ["the quick brown fox", "def is_prime(n):\n    return n > 1 and", "日本"]
NUM_TOKENS = 6


@pytest.mark.parametrize("family", [pytest.param("qwen2_moe", marks=pytest.mark.slow), "qwen3_moe"])
def test_greedy_answers_are_transformers_on_every_mesh(tiny_directory, family):
    directory = tiny_directory(family, num_experts=8)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for mesh in ("data=1", "expert=2,tensor=2"):
        options = ModelOptions(path=str(directory), dtype="float32")
        engine, tokenizer, params = open_engine(options, mesh, SamplingOptions(temperature=0.0, max_new_tokens=NUM_TOKENS))
        requests = [Request(str(index), tuple(tokenizer.encode(text)), params) for index, text in enumerate(PROMPTS)]
        found: dict[str, list[int]] = {request.key: [] for request in requests}
        for update in engine.run(requests):
            found[update.request.key] += update.tokens
        for request in requests:
            given = torch.tensor([request.prompt])
            output = reference.generate(
                given, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=0
            )
            assert found[request.key] == output[0, given.shape[1] :].tolist()
