"""On one CPU, with this project's kernels: an answer is the same whatever is answered at the same time, in bfloat16 too.

What remains is the last bits of a float32 sum (a softmax, a token's experts), which XLA adds by the shape of the batch.
"""

import math
import re

import jax
import numpy as np
import pytest
from native_kernels import needs_kernels

from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.runner import Runner
from qwen_dist.ops.paged_cache import PAGE

pytestmark = needs_kernels

LENGTHS = (1, 5, 31, 40, 64, 100, 7, 130)
PARAMS = SamplingParams(max_new_tokens=9, logprobs=2, prompt_logprobs=2)


def answers(engine, requests):
    found = {request.key: ([], []) for request in requests}
    for update in engine.run(requests):
        tokens, logprobs = found[update.request.key]
        tokens += update.tokens
        logprobs += [*update.logprobs, *update.prompt_logprobs]
    return found


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(("qwen3", "float32"), ("qwen3_5", "bfloat16")),
        pytest.param("qwen3_moe", "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(family, "float32", marks=pytest.mark.slow) for family in ("qwen2", "qwen3_moe")),
        pytest.param("qwen2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("qwen3", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_an_answer_is_the_same_alone(tiny_directory, family, dtype):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    directory = tiny_directory(family, **sizes, **({} if family == "qwen2" else {"head_dim": 32}))
    options = ModelOptions(path=str(directory), dtype=dtype)
    engine, tokenizer, _ = open_engine(options, "data=1", SamplingOptions(), max_batch_size=8, devices=jax.devices()[:1])
    tokenizer.stop_ids = frozenset()
    requests = [
        Request(row, tuple((row * 37 + 11 * place) % 311 for place in range(length)), PARAMS)
        for row, length in enumerate(LENGTHS)
    ]
    together = answers(engine, requests)
    for request in requests:
        (tokens, logprobs), (of_all, of_all_logprobs) = answers(engine, [request])[request.key], together[request.key]
        assert tokens == of_all
        of_tokens, of_tokens_of_all = ([one.logprob for one in x] for x in (logprobs, of_all_logprobs))
        np.testing.assert_allclose(of_tokens, of_tokens_of_all, rtol=0, atol=3e-6)


def test_a_step_copies_no_cache(tiny_directory):
    options = ModelOptions(path=str(tiny_directory("qwen3", head_dim=16)), dtype="bfloat16", load_format="dummy")
    engine, _, _ = open_engine(options, "data=1", SamplingOptions(), max_batch_size=1, devices=jax.devices()[:1])
    runner: Runner = engine._runner
    program = runner.lower_decode((128,)).compile().as_text()
    assert "qwen_dist_paged_attention" in program
    # Whatever its shape: XLA copied the pool of a layer when it wrote another one, reshaped, beside it.
    copied = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"= u16\[([\d,]+)\]\S* copy\(", program)]
    assert max(copied, default=0) < 128 * PAGE * 16
