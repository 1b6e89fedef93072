"""Choosing a token: what is kept is what transformers keeps, and it is drawn with its probability."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

from qwen_dist.engine import sampling
from qwen_dist.engine.generation_config import read_sampling_params
from qwen_dist.engine.request import SamplingParams
from qwen_dist.engine.sampling import SamplingArrays, apply_repetition_penalty, log_probabilities
from qwen_dist.errors import UserError

VOCAB = 61
ROWS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),  # Qwen2.5's own
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95),  # Qwen3's own
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=-1),
    SamplingParams(temperature=1.0, top_k=VOCAB),
    SamplingParams(temperature=1.0, top_k=10**9),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=3.0, top_p=0.5),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.3, min_p=0.02, top_k=7),
    SamplingParams(temperature=1.5, min_p=0.05, top_p=0.9, top_k=30, repetition_penalty=0.8),
    SamplingParams(temperature=1e-4, top_p=0.9),
    SamplingParams(temperature=1.0, repetition_penalty=2.0, top_k=5),
]


def sample(logits_BV, params, presence_BV, positions_B):
    """The whole way from logits to a token, as the engine goes it."""
    penalized_BV = apply_repetition_penalty(logits_BV, params, presence_BV, np.arange(len(logits_BV)))
    return sampling.sample(penalized_BV, params, positions_B)


compiled_sample = jax.jit(sample)


def reference_scores(params: SamplingParams, logits_V: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The logits as transformers would draw from them; removed tokens are -inf."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(logits_process.TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        steps.append(logits_process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(logits_process.MinPLogitsWarper(params.min_p))
    return steps(torch.tensor(np.flatnonzero(seen))[None], torch.tensor(logits_V)[None])[0].numpy()


@pytest.fixture
def kept(monkeypatch):
    """(params of R rows, logits [R, V], seen [R, V]) -> bool [R, V]: the tokens that `sample` would ever choose.

    Every row is asked V times, each time with noise that makes another token win if it has not been removed.
    """
    monkeypatch.setattr(sampling, "_gumbel", lambda seed, positions_B, like_BV: jax.nn.one_hot(positions_B, VOCAB) * 1e9)
    compiled = jax.jit(lambda *arguments: sample(*arguments))  # its own: no other test must meet this noise

    def kept(params, logits_RV, seen_RV):
        repeat = functools.partial(np.repeat, repeats=VOCAB, axis=0)
        wanted_B = np.tile(np.arange(VOCAB), len(params))
        arrays = SamplingArrays.from_params([row for row in params for _ in range(VOCAB)])
        chosen_B = compiled(repeat(logits_RV), arrays, repeat(seen_RV), wanted_B)
        return np.asarray(chosen_B == wanted_B).reshape(len(params), VOCAB)

    return kept


def test_the_kept_tokens_are_transformers(kept):
    rng = np.random.default_rng(0)
    params = ROWS * 8
    logits_RV = rng.normal(scale=3, size=(len(params), VOCAB)).astype(np.float32)
    seen_RV = rng.random((len(params), VOCAB)) < 0.3
    expected = [np.isfinite(reference_scores(*row)) for row in zip(params, logits_RV, seen_RV, strict=True)]
    ours = kept(params, logits_RV, seen_RV)
    for row, one, other in zip(params, ours, expected, strict=True):
        assert np.array_equal(one, other), row
    assert len({tuple(row) for row in ours}) > 60  # the rows do differ


def test_tokens_tied_with_the_last_kept_one_are_kept(kept):
    """Where PyTorch's sort decides between equals, here all of them stay; everything else is the same."""
    rng = np.random.default_rng(1)
    params = ROWS * 4
    logits_RV = rng.integers(-3, 4, (len(params), VOCAB)).astype(np.float32)
    seen_RV = np.zeros((len(params), VOCAB), bool)
    ours, num_extra = kept(params, logits_RV, seen_RV), 0
    for row, logits_V, seen, one in zip(params, logits_RV, seen_RV, ours, strict=True):
        theirs = np.isfinite(reference_scores(row, logits_V, seen))
        assert np.all(one[theirs]), row
        extra = one & ~theirs
        assert np.all(logits_V[extra] == logits_V[theirs].min()), row
        assert row.top_p < 1 or not extra.any(), row
        num_extra += extra.sum()
    assert num_extra


def test_greedy_rows_take_the_best_after_the_penalty():
    rng = np.random.default_rng(2)
    logits_BV = rng.normal(size=(64, VOCAB)).astype(np.float32)
    seen_BV = rng.random((64, VOCAB)) < 0.5
    params = [SamplingParams(repetition_penalty=penalty, seed=7) for penalty in (0.5, 1.0, 1.1, 2.0)] * 16
    tokens_B = compiled_sample(logits_BV, SamplingArrays.from_params(params), seen_BV, np.arange(64))
    expected = []
    for row, logits_V, seen in zip(params, logits_BV, seen_BV, strict=True):
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(row.repetition_penalty)
        scores = penalty(torch.tensor(np.flatnonzero(seen))[None], torch.tensor(logits_V)[None])
        expected.append(int(scores.argmax()))
    assert tokens_B.tolist() == expected
    assert expected != logits_BV.argmax(axis=-1).tolist()


def test_greedy_and_drawn_rows_in_one_batch():
    """A greedy row must not notice that its neighbour draws."""
    logits_BV = np.random.default_rng(3).normal(size=(8, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=float(row % 2), top_k=3 * (row % 2)) for row in range(8)]
    seen_BV = np.zeros((8, VOCAB), bool)
    tokens_B = np.asarray(compiled_sample(logits_BV, SamplingArrays.from_params(params), seen_BV, np.arange(8)))
    assert np.array_equal(tokens_B[::2], logits_BV.argmax(axis=-1)[::2])


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_have_the_probabilities_of_transformers(varied):
    """20,000 draws, over seeds at one position and over positions with one seed; everything switched on."""
    num_draws = 20_000
    params = SamplingParams(temperature=1.3, top_k=12, top_p=0.97, min_p=0.01, repetition_penalty=1.2, seed=5)
    rng = np.random.default_rng(4)
    logits_V = rng.normal(scale=1.5, size=23).astype(np.float32)
    seen = rng.random(23) < 0.4
    if varied == "seed":
        rows = [SamplingParams(**(vars(params) | {"seed": seed})) for seed in range(num_draws)]
        positions_B = np.full(num_draws, 17)
    else:
        rows, positions_B = [params] * num_draws, np.arange(num_draws)
    logits_BV, seen_BV = np.tile(logits_V, (num_draws, 1)), np.tile(seen, (num_draws, 1))
    tokens_B = compiled_sample(logits_BV, SamplingArrays.from_params(rows), seen_BV, positions_B)
    counts = np.bincount(tokens_B, minlength=23)
    scores = reference_scores(params, logits_V, seen).astype(np.float64)
    expected = num_draws * np.exp(scores) / np.exp(scores).sum()
    is_kept = expected > 0
    assert 8 < is_kept.sum() < 23
    assert not counts[~is_kept].any()
    assert expected[is_kept].min() > 50
    assert scipy.stats.chisquare(counts[is_kept], expected[is_kept]).pvalue > 1e-3


def test_both_halves_of_a_seed_and_the_position_count():
    logits_BV = np.zeros((400, VOCAB), np.float32)
    seen_BV = np.zeros((400, VOCAB), bool)

    def draw(seed: int, first_position: int) -> list[int]:
        params = SamplingArrays.from_params([SamplingParams(temperature=1.0, seed=seed)] * 400)
        return compiled_sample(logits_BV, params, seen_BV, first_position + np.arange(400)).tolist()

    assert draw(3, 0) == draw(3, 0)
    assert draw(3, 0)[7:] == draw(3, 7)[:-7]
    different = [draw(seed, 0) for seed in (3, 4, 3 + 2**32, -3, 2**63 - 1, -(2**63))]
    for index, one in enumerate(different):
        for other in different[:index]:
            # Equal by chance in 1 of 61 places.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 30


def test_log_probabilities_are_of_the_logits_as_they_are():
    logits_BV = np.random.default_rng(5).normal(scale=4, size=(6, VOCAB)).astype(np.float32)
    tokens_B = np.array([0, 5, 60, 3, 3, 9], np.int32)
    chosen_B, best, of_best = log_probabilities(logits_BV, tokens_B, 4)
    expected = torch.log_softmax(torch.tensor(logits_BV), dim=-1)
    values, indices = expected.topk(4)
    np.testing.assert_allclose(chosen_B, expected[range(6), tokens_B.tolist()], rtol=0, atol=2e-6)
    np.testing.assert_allclose(of_best, values, rtol=0, atol=2e-6)
    assert np.array_equal(best, indices)
    assert log_probabilities(logits_BV, tokens_B, 0)[1].shape == (6, 0)


# --- the parameters ---


def test_every_wrong_parameter_is_listed():
    with pytest.raises(UserError) as error:
        SamplingParams(
            max_new_tokens=0,
            temperature=-1.0,
            top_k=-2,
            top_p=0.0,
            min_p=1.5,
            repetition_penalty=0.0,
            seed=2**63,
            stop=("a", ""),
            logprobs=21,
        )
    assert str(error.value).split("; it must be ") == [
        "max_new_tokens is 0",
        "at least 1, or 0 to score the prompt; temperature is -1.0",
        "0 or more; top_k is -2",
        "0 or -1 (off) or more; top_p is 0.0",
        "above 0 and at most 1; min_p is 1.5",
        "between 0 and 1; repetition_penalty is 0.0",
        "above 0; seed is 9223372036854775808",
        "a 64-bit integer; stop is ('a', '')",
        "non-empty strings; logprobs is 21",
        "0 to 20",
    ]
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature is"):
            SamplingParams(temperature=value)


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.1},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        {"do_sample": True, "temperature": 0.6, "top_k": 0, "min_p": 0.1},
    ],
)
def test_generation_config_is_read_as_transformers_reads_it(tiny_checkpoint, file):
    """The list of processors that transformers itself builds from the file does to logits what ours do."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen2"))
    config, _ = model._prepare_generation_config(GenerationConfig(**file, eos_token_id=None))
    ids = torch.tensor([[1, 2, 3]])
    processors = model._get_logits_processor(config, 3, ids, None, None)
    logits_V = np.random.default_rng(6).normal(scale=3, size=VOCAB).astype(np.float32)
    seen = np.isin(np.arange(VOCAB), [1, 2, 3])
    theirs = processors(ids, torch.tensor(logits_V)[None])[0].numpy()
    params = read_sampling_params(file)
    assert (params.temperature == 0) == (not config.do_sample)
    if params.temperature == 0:
        params = params.override({"temperature": 1.0})
    np.testing.assert_allclose(reference_scores(params, logits_V, seen), theirs, rtol=1e-6)


def test_override_keeps_what_is_not_given():
    params = SamplingParams(temperature=0.5, top_k=3, stop=("x",))
    assert params.override({"temperature": None, "top_k": 0, "stop": ["a", "b"]}) == SamplingParams(
        temperature=0.5, top_k=0, stop=("a", "b")
    )
    assert params.override({"top_k": -1}).top_k == -1
    with pytest.raises(UserError, match="top_k is -2"):
        params.override({"top_k": -2})
