"""The engine against transformers' `generate`, each prompt against itself alone, and one mesh against another."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch
import transformers

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.batch import BatchBuilder
from qwen_dist.engine.engine import CHUNK_SIZE, MAX_CHUNKS, Detokenizer, Engine, cache_limits
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams
from qwen_dist.engine.runner import Runner, SamplingTable
from qwen_dist.engine.scheduler import Scheduler
from qwen_dist.errors import UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import MAX_ENTRIES, PAGE
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
NUM_NEW = 20
# One token; a part of a page; the answer begins on a page of its own; more than a piece.
LENGTHS = (1, 17, 4 * PAGE, MAX_CHUNKS * CHUNK_SIZE + 70)
GREEDY = SamplingParams(max_new_tokens=NUM_NEW)
PENALISED = SamplingParams(max_new_tokens=NUM_NEW, repetition_penalty=1.3)
RNG = np.random.default_rng(11)
PROMPTS = [tuple(RNG.integers(0, 331, length).tolist()) for length in LENGTHS]


@pytest.fixture(scope="module")
def directory(tiny_directory):
    return tiny_directory("qwen3", **SIZES)


@pytest.fixture(scope="module")
def tokenizer(directory):
    """Without an end: answers go on to `max_new_tokens` where a test does not say otherwise."""
    tokenizer = Tokenizer.open(directory)
    tokenizer.stop_ids = frozenset()
    return tokenizer


@pytest.fixture(scope="module")
def model(directory):
    @functools.cache
    def on(mesh: str):
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
        return load_model(directory, sharding_ctx, dtype="float32")

    return on


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return functools.cache(lambda mesh: Engine(model(mesh), tokenizer, max_batch_size=4))


@pytest.fixture(scope="module")
def reference(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def expected(reference):
    """repetition penalty -> the tokens that transformers continues each prompt with, one prompt at a time."""

    @functools.cache
    def tokens(penalty: float) -> list[list[int]]:
        answers = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=NUM_NEW,
                    repetition_penalty=penalty,
                )
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    return tokens


def answers(engine: Engine, prompts, params) -> list[list[RequestOutput]]:
    """The updates of each prompt; `params` is one for all or one each."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [Request(index, prompt, row) for index, (prompt, row) in enumerate(zip(prompts, params, strict=True))]
    updates: list[list[RequestOutput]] = [[] for _ in requests]
    for update in engine.run(requests):
        assert not updates[update.request.key] or updates[update.request.key][-1].finish_reason is None
        updates[update.request.key].append(update)
    assert all(row[-1].finish_reason is not None for row in updates)
    return updates


def tokens_of(updates: list[RequestOutput]) -> list[int]:
    tokens = [token for update in updates for token in update.tokens]
    assert updates[-1].num_generated == len(tokens)
    return tokens


def text_of(updates: list[RequestOutput]) -> str:
    return "".join(update.text for update in updates)


# --- greedy ---


@pytest.mark.parametrize("mesh", ["", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("params", [GREEDY, PENALISED], ids=["plain", "penalised"])
def test_greedy_answers_of_a_batch_are_transformers(engine, expected, tokenizer, params, mesh):
    updates = answers(engine(mesh), PROMPTS, params)
    assert [tokens_of(row) for row in updates] == expected(params.repetition_penalty)
    assert [row[-1].finish_reason for row in updates] == ["length"] * len(PROMPTS)
    assert [text_of(row) for row in updates] == [tokenizer.decode(tokens_of(row)) for row in updates]


def test_the_reference_answers_are_no_trivial_ones(expected):
    """A model that repeats itself would let many faults through."""
    for penalty in (1.0, 1.3):
        assert all(len(set(tokens)) > 8 for tokens in expected(penalty))
    assert all(one != other for one, other in zip(expected(1.0), expected(1.3), strict=True))


def test_every_prompt_alone_gets_the_same_answer(engine, expected):
    alone = [tokens_of(answers(engine(""), [prompt], GREEDY)[0]) for prompt in PROMPTS]
    assert alone == expected(1.0)


def test_fewer_key_value_heads_than_devices(engine, expected):
    """2 heads on 8 devices: each has both, and 8 query heads are split."""
    updates = answers(engine("tensor=8"), PROMPTS[:2], GREEDY)
    assert [tokens_of(row) for row in updates] == expected(1.0)[:2]


def test_rows_with_parameters_of_their_own(engine, expected):
    params = [GREEDY, PENALISED, SamplingParams(max_new_tokens=3), PENALISED]
    updates = answers(engine(""), PROMPTS, params)
    wanted = [expected(1.0)[0], expected(1.3)[1], expected(1.0)[2][:3], expected(1.3)[3]]
    assert [tokens_of(row) for row in updates] == wanted


def test_more_requests_than_a_batch_holds(engine, expected):
    """Five requests, four at a time; every answer carries its request."""
    updates = answers(engine(""), [*PROMPTS, PROMPTS[3]], GREEDY)
    assert [tokens_of(row) for row in updates] == [*expected(1.0), expected(1.0)[3]]


def test_a_batch_that_is_never_full(engine, expected):
    """Three requests are four rows on the devices: nothing of the fourth is seen."""
    updates = answers(engine(""), [PROMPTS[3], PROMPTS[0], PROMPTS[1]], GREEDY)
    assert [tokens_of(row) for row in updates] == [expected(1.0)[index] for index in (3, 0, 1)]
    assert list(engine("").run([])) == []


def test_the_first_token_does_not_wait_for_the_next_program(model, tokenizer, expected, monkeypatch):
    engine = Engine(model(""), tokenizer, max_batch_size=1)
    monkeypatch.setattr(engine._runner, "_decode", lambda *args, **more: pytest.fail("the next step came first"))
    first = next(engine.run([Request(0, PROMPTS[1], GREEDY)]))
    assert list(first.tokens) == expected(1.0)[1][:1]


@pytest.mark.parametrize("num_steps", [3, PAGE])
def test_several_steps_in_a_dispatch(model, tokenizer, expected, num_steps):
    engine = Engine(model(""), tokenizer, max_batch_size=4, steps_per_dispatch=num_steps)
    assert [tokens_of(row) for row in answers(engine, PROMPTS, GREEDY)] == expected(1.0)


@pytest.mark.slow
def test_rows_that_give_their_pages_back_are_answered_all_the_same(model, tokenizer, expected):
    """Two prompts fill all pages; the first to need one more takes them from the other."""
    one = sum(page_bytes(state_specs(model("").config, model("").dtype), model("").sharding_ctx))
    prompts = [PROMPTS[2][:-2], PROMPTS[2][:-1], PROMPTS[2]]
    small = Engine(model(""), tokenizer, max_batch_size=4, cache_bytes=8 * one)
    large = Engine(model(""), tokenizer, max_batch_size=4)
    assert [tokens_of(row) for row in answers(small, prompts, GREEDY)] == [
        tokens_of(row) for row in answers(large, prompts, GREEDY)
    ]
    assert small.stats.num_preempted > 0 and large.stats.num_preempted == 0
    assert small.stats.held_positions == 0


def test_the_state_is_donated_and_stays_where_the_rules_say(model):
    loaded = model("data=2,fsdp=2,tensor=2")
    runner, sampling = Runner(loaded, num_slots=2), SamplingTable(2)
    limits = cache_limits(runner.specs, loaded.sharding_ctx, num_slots=1, max_length=PAGE)
    sizes = {"num_slots": 2, "num_shards": 2, "chunk_size": CHUNK_SIZE, "max_chunks": MAX_CHUNKS}
    scheduler, batches = Scheduler(limits, max_pages=8, **sizes), BatchBuilder(limits, entry_multiple=MAX_ENTRIES, **sizes)
    scheduler.add(Request(0, PROMPTS[1], GREEDY), end=PAGE - 1)
    (batch,) = batches.build(scheduler.schedule(can_preempt=True), scheduler.num_pages)
    assert batch.is_prefill
    before = runner.start(scheduler.num_pages)
    after, _ = runner.step(before, batch, sampling.look_up(batch.slots_B, ()), num_top=None)
    axes = ("batch", "pages", "kv_heads", "kv_length", "head_dim")
    for old, new in zip(jax.tree.leaves(before.states), jax.tree.leaves(after.states), strict=True):
        assert old.is_deleted()
        assert new.sharding.is_equivalent_to(loaded.sharding_ctx.activation("state", new.shape, axes), new.ndim)
        assert new.addressable_shards[0].data.size == new.size // 4  # half of the batch, and half of the heads


# --- ends ---


def test_stop_ids_end_each_row_by_itself(engine, expected, tokenizer, monkeypatch):
    stop_ids = {expected(1.0)[0][5], expected(1.0)[2][0]}
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset(stop_ids))
    updates = answers(engine(""), PROMPTS, GREEDY)
    reasons = []
    for row, full in zip(updates, expected(1.0), strict=True):
        end = next((index for index, token in enumerate(full) if token in stop_ids), None)
        assert tokens_of(row) == (full if end is None else full[: end + 1])
        assert text_of(row) == tokenizer.decode(full if end is None else full[:end])  # the end itself is not shown
        assert row[-1].finish_reason == ("length" if end is None else "stop")
        reasons.append(row[-1].finish_reason)
    assert set(reasons) == {"stop", "length"}
    assert len(tokens_of(updates[2])) == 1


def test_stop_strings(engine, expected, tokenizer):
    pieces = [tokenizer.decode([token]) for token in expected(1.0)[1]]
    full = "".join(pieces)
    # The first two neighbours in plain letters that are nowhere before: a string across the border of two tokens.
    stop = next(
        one[-1] + other[0]
        for one, other in itertools.pairwise(pieces)
        if (one + other).isascii() and one and other and full.index(one[-1] + other[0]) > 4
    )
    params = SamplingParams(max_new_tokens=NUM_NEW, stop=("never this", stop))
    updates = answers(engine(""), PROMPTS, [GREEDY, params, GREEDY, GREEDY])
    assert text_of(updates[1]) == full[: full.index(stop)]
    assert updates[1][-1].finish_reason == "stop"
    assert len(tokens_of(updates[1])) < NUM_NEW
    assert tokens_of(updates[1]) == expected(1.0)[1][: len(tokens_of(updates[1]))]
    assert tokens_of(updates[3]) == expected(1.0)[3]


def test_special_tokens_as_stop_texts_and_more_stop_ids_end_an_answer(tokenizer):
    """The text of an answer has no special tokens, so a search of the text would not find them."""
    start = tokenizer.special_id("<|im_start|>")
    fox, dog = (tokenizer.encode(text)[0] for text in ("f", "d"))
    assert start not in tokenizer.stop_ids
    for params, end in (({"stop": ("<|im_start|>",)}, start), ({"stop_token_ids": (dog,)}, dog)):
        answer = Detokenizer(Request(None, (fox,), SamplingParams(**params)), tokenizer, end=20)
        assert answer.push([fox], []).finish_reason is None
        output = answer.push([fox, end, fox], [])
        assert (output.text, output.tokens, output.finish_reason) == ("f", (fox, end), "stop")


def test_a_stop_string_at_the_very_end_is_a_stop(engine, expected, tokenizer):
    pieces = [tokenizer.decode([token]) for token in expected(1.0)[1]]
    last = next(
        i for i in range(2, NUM_NEW) if pieces[i].strip() and pieces[i].isascii() and pieces[i] not in "".join(pieces[:i])
    )
    params = SamplingParams(max_new_tokens=last + 1, stop=(pieces[last],))
    (row,) = answers(engine(""), PROMPTS[1:2], params)
    assert (text_of(row), row[-1].finish_reason) == ("".join(pieces[:last]), "stop")


def test_the_end_of_the_context(engine, expected, monkeypatch):
    monkeypatch.setattr(engine(""), "max_context", LENGTHS[3] + 7)
    updates = answers(engine(""), PROMPTS, GREEDY)
    assert [len(tokens_of(row)) for row in updates] == [NUM_NEW, NUM_NEW, NUM_NEW, 7]
    assert tokens_of(updates[3]) == expected(1.0)[3][:7]
    assert updates[3][-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty; give at least one token"),
        ((1,) * 2048, r"the prompt has 2048 tokens and the model's context 2048, .*shorten the prompt"),
        ((1, 344), "the prompt has token ids outside the vocabulary of 344"),
        ((-1, 1), "outside the vocabulary"),
    ],
)
def test_requests_that_cannot_be_run(engine, prompt, message):
    request = Request(None, prompt, GREEDY)
    with pytest.raises(UserError, match=message):
        engine("").check(request)
    with pytest.raises(UserError, match=message):  # before anything of the good request is answered
        next(engine("").run([Request(None, (1,), GREEDY), request]))
    engine("").check(Request(None, (0, 343) * 1023, GREEDY))


def test_a_tokenizer_of_another_checkpoint(model, directory):
    tokenizer = Tokenizer.open(directory)
    tokenizer.vocab_size = 345
    with pytest.raises(UserError, match=r"knows ids up to 344 and the model only 344; .* not of the same checkpoint"):
        Engine(model(""), tokenizer)


# --- log-probabilities ---


ASKED = (3, None, 0, 5)
INDICES = (0, 1, 1, 0)


def ask_for_log_probabilities(engine) -> list[list[RequestOutput]]:
    params = [SamplingParams(NUM_NEW, repetition_penalty=1.3, logprobs=number) for number in ASKED]
    return answers(engine(""), [PROMPTS[index] for index in INDICES], params)


def test_log_probabilities(engine, reference, expected):
    """Of the unmodified distribution, also where a penalty chose the token; each row as many as it asked for."""
    for index, number, row in zip(INDICES, ASKED, ask_for_log_probabilities(engine), strict=True):
        tokens, logprobs = tokens_of(row), [logprob for update in row for logprob in update.logprobs]
        assert tokens == expected(1.3)[index]
        if number is None:
            assert logprobs == []
            continue
        prompt = PROMPTS[index]
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(logits.double(), dim=-1).numpy()
        assert [logprob.token for logprob in logprobs] == tokens
        for step, logprob in enumerate(logprobs):
            assert abs(logprob.logprob - log_probs[step, logprob.token]) < 2e-5
            assert [token for token, _ in logprob.top] == np.argsort(-log_probs[step])[:number].tolist()
            for token, value in logprob.top:
                assert abs(value - log_probs[step, token]) < 2e-5


@pytest.mark.parametrize("mesh", ["", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_prompts_are_scored(engine, reference, expected, mesh):
    """With and without an answer after it, next to one that is not scored; a prompt may be read in several pieces."""
    scored = SamplingParams(0, prompt_logprobs=3)
    params = [SamplingParams(0, prompt_logprobs=0), GREEDY, scored, scored.override({"max_new_tokens": NUM_NEW})]
    for index, row in enumerate(answers(engine(mesh), PROMPTS, params)):
        prompt, wanted, scores = PROMPTS[index], params[index].prompt_logprobs, row[-1].prompt_logprobs
        is_answered = params[index].max_new_tokens > 0
        assert tokens_of(row) == (expected(1.0)[index] if is_answered else [])
        assert row[-1].finish_reason == "length"
        assert [score.token for score in scores] == ([] if wanted is None else list(prompt[1:]))
        with torch.no_grad():
            log_probs = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].double(), dim=-1).numpy()
        for step, score in enumerate(scores):
            assert abs(score.logprob - log_probs[step, score.token]) < 2e-5
            assert len(score.top) == wanted
            assert all(abs(value - log_probs[step, token]) < 2e-5 for token, value in score.top)
            assert [value for _, value in score.top] == sorted((value for _, value in score.top), reverse=True)
            assert not score.top or abs(score.top[0][1] - log_probs[step].max()) < 2e-5


def test_a_prompt_that_is_read_twice_is_scored_once(model, tokenizer):
    """A pool that is too small for all: some give their pages back, and are read again."""
    params = SamplingParams(3 * PAGE, prompt_logprobs=1)
    prompts = [tuple(RNG.integers(0, 331, PAGE + 1 + 7 * row).tolist()) for row in range(4)]
    small = 6 * sum(page_bytes(state_specs(model("").config, model("").dtype), model("").sharding_ctx))
    crowded = Engine(model(""), tokenizer, max_batch_size=4, cache_bytes=small)
    rows = answers(crowded, prompts, params)
    assert crowded.stats.num_preempted > 0
    for prompt, row in zip(prompts, rows, strict=True):
        assert [score.token for score in row[-1].prompt_logprobs] == list(prompt[1:])


def test_no_log_probability_of_the_stop_token(engine, expected, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset({expected(1.3)[0][4]}))
    row = ask_for_log_probabilities(engine)[0]
    shown = [logprob.token for update in row for logprob in update.logprobs]
    assert shown == tokens_of(row)[:-1] == expected(1.3)[0][:4]


# --- drawing ---


def test_draws_depend_on_the_seed_and_not_on_the_batch(engine):
    def draw(seed: int, **more) -> SamplingParams:
        return SamplingParams(max_new_tokens=NUM_NEW, temperature=1.0, seed=seed, **more)

    params = [draw(1), draw(2, top_k=50), draw(3, top_p=0.9), draw(4, min_p=0.01, repetition_penalty=1.2)]
    together = [tokens_of(row) for row in answers(engine(""), PROMPTS, params)]
    alone = [tokens_of(answers(engine(""), [prompt], row)[0]) for prompt, row in zip(PROMPTS, params, strict=True)]
    assert together == alone
    on_mesh = [tokens_of(row) for row in answers(engine("data=2,fsdp=2,tensor=2"), PROMPTS, params)]
    assert on_mesh == together

    same_prompt = [PROMPTS[1]] * 4
    one, again, other, greedy = (
        tokens_of(row) for row in answers(engine(""), same_prompt, [draw(1), draw(1), draw(2), GREEDY])
    )
    assert one == again
    assert len({tuple(one), tuple(other), tuple(greedy)}) == 3
