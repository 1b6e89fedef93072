"""Steps of chunks of prompts and of sequences that decode: the answers of each request alone, and the same states."""

from typing import Any

import jax
import pytest

from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.ops.paged_cache import PAGE

# Prompts of one chunk, of some and of more than a step has, which come while others decode.
LENGTHS = (3, 2 * PAGE + 5, 40, 9 * PAGE, 1, 70)
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def engine_of(tiny_directory):
    def build(family, mesh="data=1", **more):
        is_mixture = family in ("qwen3_moe", "qwen3_5_moe")
        options = ModelOptions(
            path=str(tiny_directory(family, **SIZES, **({"num_experts": 8} if is_mixture else {}))), dtype="float32"
        )
        devices = jax.devices()[:1] if mesh == "data=1" else None
        engine, tokenizer, _ = open_engine(options, mesh, SamplingOptions(), max_batch_size=4, devices=devices, **more)
        tokenizer.stop_ids = frozenset()
        return engine

    return build


def count_mixed_steps(engine) -> list[tuple[int, int]]:
    """Return a list that gets the numbers of rows of each step that computes both."""
    steps, mixed_step = [], engine._runner.mixed_step

    def counted(state, batches, samplings, **more):
        steps.append(tuple(sum(sequence is not None for sequence in batch.sequences) for batch in batches))
        return mixed_step(state, batches, samplings, **more)

    engine._runner.mixed_step = counted
    return steps


def answers(engine, requests) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {request.key: [] for request in requests}
    for update in engine.run(requests):
        found[update.request.key] += update.tokens
    return found


def requests_of(params=lambda row: SamplingParams(max_new_tokens=3 + 5 * row)) -> list[Request]:
    return [
        Request(row, tuple((row * 37 + 11 * place) % 311 for place in range(length)), params(row))
        for row, length in enumerate(LENGTHS)
    ]


CASES = [
    ("qwen3", "data=1"),
    ("qwen3_5", "data=2,tensor=2"),
    pytest.param("qwen3_moe", "data=2,expert=2", marks=pytest.mark.slow),
    pytest.param("qwen3_next", "data=1", marks=pytest.mark.slow),
    pytest.param("qwen3_5_moe", "data=2,expert=2", marks=pytest.mark.slow),
    pytest.param("qwen2", "fsdp=2,tensor=2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_answers_are_those_of_each_request_alone(engine_of, family, mesh):
    engine = engine_of(family, mesh)
    steps = count_mixed_steps(engine)
    requests = requests_of()
    together = answers(engine, requests)
    assert len(steps) >= 2 and max(decoding for _, decoding in steps) > 1
    del steps[:]
    assert together == {request.key: answers(engine, [request])[request.key] for request in requests}
    assert not steps, "a request alone has nothing to share a step with"


def test_drawn_answers_and_penalties(engine_of):
    """Requests that draw share steps, too; where one has a penalty, two programs compute the step."""

    def params(row: int) -> SamplingParams:
        penalty = {"frequency_penalty": 0.5} if row == 4 else {}
        return SamplingParams(max_new_tokens=3 + 5 * row, temperature=1.0, seed=row, repetition_penalty=1.2, **penalty)

    engine = engine_of("qwen3")
    steps, requests = count_mixed_steps(engine), requests_of(params)
    together = answers(engine, requests)
    assert steps
    assert together == {request.key: answers(engine, [request])[request.key] for request in requests}


@pytest.mark.slow
def test_with_log_probabilities_two_programs_compute_a_step(engine_of):
    engine = engine_of("qwen3")
    requests = requests_of(lambda row: SamplingParams(max_new_tokens=3 + 5 * row, logprobs=2, prompt_logprobs=1))
    steps = count_mixed_steps(engine)
    together = answers(engine, requests)
    assert not steps
    assert together == {request.key: answers(engine, [request])[request.key] for request in requests}


@pytest.mark.slow
def test_where_length_is_sharded_two_programs_compute_a_step(engine_of):
    engine = engine_of("qwen3", "context=2")
    assert not engine._runner.can_mix
    requests = requests_of()
    assert answers(engine, requests) == answers(engine_of("qwen3"), requests)


@pytest.mark.slow
def test_warming_up_compiles_the_programs_of_mixed_steps(engine_of):
    engine = engine_of("qwen3", policy="latency")
    engine.warm_up()
    sizes = engine._runner._mixed._cache_size()
    assert sizes == len(engine._batches._prefill_widths)
    answers(engine, requests_of())
    assert engine._runner._mixed._cache_size() == sizes


def test_a_warm_up_compiles_first_and_runs_what_it_has_compiled(engine_of):
    engine, compiled, counts = engine_of("qwen3", policy="latency"), [], []

    def note(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        engine.warm_up(lambda done, total: counts.append((done, total, len(compiled))))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    *_, (last, total, num_compiled), (done, _, num_at_end) = counts
    assert (last, done) == (total - 1, total)
    assert total <= num_compiled == num_at_end


@pytest.mark.parametrize(("policy", "comes_at_once"), [("latency", True), ("throughput", False)])
def test_for_latency_a_step_on_a_cpu_returns_its_own_tokens(engine_of, policy, comes_at_once):
    engine = engine_of("qwen3", policy=policy)
    engine.add_request(requests_of()[0])
    assert bool(engine.step()) is comes_at_once
