"""Thousands of requests of every kind through a real model: none is stuck, lost or miscounted, and the pool is empty."""

import numpy as np
import pytest

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("family", "count", "rows", "num_pages", "num_steps"),
    [
        pytest.param("qwen3", 300, 16, 20, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 10_000, 48, 90, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 2000, 7, 12, 8, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 60, 5, 9, 1, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 2000, 16, 20, 1, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 500, 7, 12, 8, marks=pytest.mark.slow),
    ],
)
def test_every_request_ends_as_it_should(tiny_directory, family, count, rows, num_pages, num_steps):
    sizes = {"num_hidden_layers": 2 if family == "qwen3_5" else 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    directory = tiny_directory(family, head_dim=16, **sizes)
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse("data=1")), INFERENCE)
    model, tokenizer = load_model(directory, sharding_ctx, dtype="float32"), Tokenizer.open(directory)
    specs = state_specs(model.config, model.dtype)
    cache_bytes = num_pages * sum(page_bytes(specs, sharding_ctx)) + rows * slot_bytes(specs, sharding_ctx)
    engine = Engine(model, tokenizer, max_batch_size=rows, cache_bytes=cache_bytes, steps_per_dispatch=num_steps)
    rng, coming = np.random.default_rng(count), iter(range(count))
    running: dict[int, Request] = {}
    answers: dict[int, tuple[Request, list[int], str, str]] = {}
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    cancelled = set()
    most_held = num_idle = 0
    while True:
        while len(running) < 3 * rows and (key := next(coming, None)) is not None:
            running[key] = random_request(rng, key)
            texts[key], tokens[key] = "", []
            engine.add_request(running[key])
        if running and rng.random() < 0.1:
            key = list(running)[int(rng.integers(len(running)))]
            engine.abort(running.pop(key))
            cancelled.add(key)
        if engine.is_idle:
            break
        updates = engine.step()
        num_idle = 0 if updates else num_idle + 1
        assert num_idle < 100, "stuck"
        most_held = max(most_held, engine.stats.held_positions)
        for update in updates:
            key = update.request.key
            assert key in running and running[key] is update.request
            texts[key] += update.text
            tokens[key] += update.tokens
            assert update.num_generated == len(tokens[key])
            if update.finish_reason is not None:
                answers[key] = (running.pop(key), tokens.pop(key), texts.pop(key), update.finish_reason)
    list(engine.step())  # what was in flight when the last one ended

    assert answers.keys() | cancelled == set(range(count)) and not answers.keys() & cancelled
    reasons = {"stop": 0, "length": 0}
    for request, written, text, reason in answers.values():
        reasons[reason] += 1
        limit = min(request.params.max_new_tokens, engine.max_context - len(request.prompt))
        assert len(written) == limit if reason == "length" else len(written) <= limit
        assert not any(stop in text for stop in request.params.stop)
    assert min(reasons.values()) > 0 and cancelled
    load = engine.stats
    assert (load.num_running, load.num_waiting, load.held_positions, load.live_positions) == (0, 0, 0, 0)
    assert most_held <= num_pages * PAGE
    # Each as if alone.
    alone = Engine(model, tokenizer, max_batch_size=1)
    for key in list(answers)[:: max(1, len(answers) // 40)]:
        request, written, text, _ = answers[key]
        updates = list(alone.run([request]))
        assert [token for update in updates for token in update.tokens] == written
        assert "".join(update.text for update in updates) == text
    print(
        f"{count} requests: {reasons}, {len(cancelled)} cancelled, {load.num_preempted} preempted, at most {most_held} "
        f"of {load.cache_positions} positions held; none stuck, pool empty"
    )


def random_request(rng: np.random.Generator, key: int) -> Request:
    is_greedy = rng.random() < 0.5
    params = SamplingParams(
        max_new_tokens=int(rng.integers(1, 40)),
        temperature=0.0 if is_greedy else float(rng.uniform(0.2, 2)),
        top_k=int(rng.integers(0, 20)),
        top_p=float(rng.uniform(0.5, 1)),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        seed=int(rng.integers(2**62)),
        stop=tuple(rng.choice(["e", "qu", " the", "1", "x y"], int(rng.integers(0, 3)))),
    )
    return Request(key, tuple(rng.integers(3, 300, int(rng.integers(1, 3 * PAGE))).tolist()), params)
