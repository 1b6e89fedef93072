"""Hybrid models through the engine: the tokens of transformers, whatever the batch, the chunks and the slots."""

import pytest
import torch
import transformers

from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request
from qwen_dist.ops.paged_cache import PAGE

NUM_TOKENS = 6
# One token, a chunk and a bit, several chunks, and one token repeated, whose keys are all equal.
PROMPTS = [(7,), tuple(range(10, 10 + 2 * PAGE + 3)), tuple(range(20, 20 + 5 * PAGE)), (9,) * (PAGE + 1), (5, 6, 7)]
FAMILIES = ["qwen3_5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_next", "qwen3_5_moe"))]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 8, "linear_num_value_heads": 6}


def expected_answers(directory, stop_ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": list(stop_ids), "pad_token_id": 0}
    given = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [model.generate(one, **settings)[0, one.shape[1] :].tolist() for one in given]


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_transformers(tiny_directory, family, mesh):
    """With four slots for five prompts, a slot is used again; the answers are the same in another order."""
    directory = tiny_directory(family, **SIZES, **({} if family == "qwen3_5" else {"num_experts": 8}))
    options = ModelOptions(path=str(directory), dtype="float32")
    sampling = SamplingOptions(temperature=0.0, max_new_tokens=NUM_TOKENS)
    engine, tokenizer, params = open_engine(options, mesh, sampling, max_batch_size=4)
    expected = expected_answers(directory, tokenizer.stop_ids)
    requests = [Request(index, prompt, params) for index, prompt in enumerate(PROMPTS)]
    for order in (1, -1):
        found = [[] for _ in PROMPTS]
        for update in engine.run(requests[::order]):
            found[update.request.key] += update.tokens
        assert found == expected
