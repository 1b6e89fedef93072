"""Layers that see a window only: the answers are transformers', and the cache keeps the window only."""

import numpy as np
import pytest
import torch
import transformers

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import CHUNK_SIZE, MAX_CHUNKS, Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes
from qwen_dist.models.state_spec import cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

WINDOW, STEP = 37, MAX_CHUNKS * CHUNK_SIZE
# The pages that a window and a step's tokens span: a longer sequence reuses its pages.
RING = -(-(WINDOW + STEP - 2) // PAGE) + 1
# The first is computed in three steps of prefill and uses its ring twice; the second reuses its pages while it decodes.
LENGTHS, NUM_NEW = (2 * RING * PAGE + 50, RING * PAGE - 20, WINDOW + 5, 3), 60
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "sliding_window": WINDOW}
CASES = {
    "mixed": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "max_window_layers": 1}, {None: 1, WINDOW: 2}),
    "mixed experts": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 2}, {WINDOW: 1, None: 2}),
    "windows only": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {WINDOW: 3}),
}


@pytest.fixture(params=["mixed", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "mixed")])
def checkpoint(request, tiny_directory):
    family, values, windows = CASES[request.param]
    return tiny_directory(family, **SIZES, **values), windows


@pytest.mark.parametrize("mesh", ["", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_answers_beyond_the_window_are_transformers_and_memory_is_the_windows(checkpoint, mesh):
    directory, windows = checkpoint
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
    model, tokenizer = load_model(directory, sharding_ctx, dtype="float32"), Tokenizer.open(directory)
    groups = cache_groups(state_specs(model.config, model.dtype))
    assert {group.window: len(group.layers) for group in groups} == windows
    tokenizer.stop_ids = frozenset()
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, 300, length).tolist()) for length in LENGTHS]
    expected = transformers_answers(directory, prompts)
    # With little memory the others wait for the first.
    little = (2 * RING + 3) * sum(page_bytes(state_specs(model.config, model.dtype), sharding_ctx))
    for cache_bytes in (10**9, little):
        engine = Engine(model, tokenizer, max_batch_size=4, cache_bytes=cache_bytes)
        found: list[list[int]] = [[] for _ in prompts]
        requests = [Request(index, prompt, SamplingParams(NUM_NEW)) for index, prompt in enumerate(prompts)]
        for update in engine.run(requests):
            found[update.request.key] += update.tokens
            for window, held in zip(windows, engine._scheduler.num_held_pages, strict=True):
                assert window is None or held <= engine.stats.num_running * RING
        assert found == expected
        assert engine.stats.held_positions == 0


def transformers_answers(directory, prompts):
    """One prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW)
        found.append(out[0, len(prompt) :].tolist())
    return found
