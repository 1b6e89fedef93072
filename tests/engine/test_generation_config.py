"""generation_config.json: what is applied is what transformers applies, and what is not applied is refused by name."""

import inspect
import operator

import jax
import numpy as np
import pytest
import torch
import transformers

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.generation_config import read_sampling_params
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.errors import CheckpointError, UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

NUM_NEW = 12
RNG = np.random.default_rng(3)
PROMPTS = [tuple(RNG.integers(0, 331, length).tolist()) for length in (1, 9, 70)]


@pytest.fixture(scope="module")
def directory(tiny_directory):
    return tiny_directory("qwen3", num_attention_heads=8, num_hidden_layers=2)


@pytest.fixture(scope="module")
def reference(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(reference):
    """The greedy answers without an end and without a processor."""
    return [theirs(reference, prompt, {"eos_token_id": None}) for prompt in PROMPTS]


def theirs(reference, prompt, generation, **more):
    """The tokens that transformers generates with this generation_config.json."""
    reference.generation_config = transformers.GenerationConfig(
        **({"pad_token_id": 0, "max_new_tokens": NUM_NEW} | generation | more)
    )
    ids = torch.tensor([prompt])
    return reference.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()


def make_engine(directory, mesh, stop_ids=frozenset(), **options):
    tokenizer = Tokenizer.open(directory)
    tokenizer.stop_ids = frozenset(stop_ids)
    devices = jax.devices()[: MeshConfig.parse(mesh).num_devices]
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh), devices), INFERENCE)
    model = load_model(directory, sharding_ctx, dtype="float32")
    return Engine(model, tokenizer, **({"max_batch_size": 4} | options))


def ours(engine, prompts, params):
    """The tokens of each prompt; `params` are those of all prompts or a list."""
    params = params if isinstance(params, list) else [params] * len(prompts)
    tokens = {index: [] for index in range(len(prompts))}
    for output in engine.run(Request(i, p, one) for i, (p, one) in enumerate(zip(prompts, params, strict=True))):
        tokens[output.request.key] += output.tokens
    return list(tokens.values())


def restricted(plain, eos):
    """Files that change greedy answers, made from the answers without them; the last ones end at `eos`."""
    first, often = [tokens[0] for tokens in plain], [token for tokens in plain for token in tokens[:4]]
    ending = {"eos_token_id": eos}
    return {
        "suppress_tokens": {"suppress_tokens": often},
        "begin_suppress_tokens": {"begin_suppress_tokens": first},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
        "bad_words_ids": {"bad_words_ids": [[tokens[3]] for tokens in plain] + [tokens[1:3] for tokens in plain]},
        "bad_words_ids of three": {"bad_words_ids": [tokens[:3] for tokens in plain]},
        "sequence_bias": {"sequence_bias": [[[tokens[0]], -3.5] for tokens in plain] + [[plain[0][1:3], -2.0]]},
        "max_length": {"max_length": 79, "max_new_tokens": None},
        "min_new_tokens": ending | {"min_new_tokens": 7},
        "min_length": ending | {"min_length": 13},
        "both lengths": ending | {"min_length": 75, "min_new_tokens": 2},
        "the end is no bad word": ending | {"bad_words_ids": [[token] for token in (*eos[:2], *first)]},
        "all": ending
        | {"suppress_tokens": often[:3], "begin_suppress_tokens": first, "no_repeat_ngram_size": 2}
        | {"bad_words_ids": [[token, token] for token in often[:5]], "sequence_bias": [[[id], 1.5] for id in first]}
        | {"min_new_tokens": 5, "repetition_penalty": 1.2},
    }


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2,tensor=4", marks=pytest.mark.slow)])
def test_greedy_answers_are_transformers(directory, reference, plain, mesh):
    """All files at once: requests with different processors and without any share the steps."""
    engine, eos = (
        make_engine(directory, mesh, max_batch_size=2),
        sorted({token for tokens in plain for token in tokens[2:5]}),
    )
    files = restricted(plain, eos)
    for stop_ids in ([], eos):
        engine._tokenizer.stop_ids = frozenset(stop_ids)
        cases = [
            (name, prompt, {"eos_token_id": None} | file)
            for name, file in files.items()
            for prompt in PROMPTS
            if file.get("eos_token_id", []) == stop_ids and (name != "max_length" or len(prompt) > 60)
        ]
        params = [read_sampling_params({"max_new_tokens": NUM_NEW} | file) for _, _, file in cases]
        answers = ours(
            engine, [PROMPTS[1], *(prompt for _, prompt, _ in cases)], [SamplingParams(max_new_tokens=NUM_NEW), *params]
        )
        if not stop_ids:
            assert answers[0] == plain[1]
        for (name, prompt, file), answer in zip(cases, answers[1:], strict=True):
            assert answer == theirs(reference, prompt, file), (name, len(prompt))
        unchanged = [plain[PROMPTS.index(prompt)] for _, prompt, _ in cases]
        assert sum(map(operator.ne, answers[1:], unchanged)) > len(cases) * 2 // 3


@pytest.mark.slow
def test_a_preempted_request_keeps_its_processors(directory, reference):
    generation = {"no_repeat_ngram_size": 2, "max_new_tokens": 40, "eos_token_id": None}
    prompts, params = [PROMPTS[2][:60], PROMPTS[2][:61], PROMPTS[2][:62]], read_sampling_params(generation)
    large = make_engine(directory, "data=1")
    one = sum(page_bytes(large._runner.specs, large._runner._model.sharding_ctx))
    small = make_engine(directory, "data=1", cache_bytes=4 * one)
    assert ours(small, prompts, params) == [theirs(reference, prompt, generation) for prompt in prompts]
    assert small.stats.num_preempted > 0


def test_a_vocabulary_that_tensor_does_not_divide(tiny_directory):
    directory = tiny_directory("qwen3", vocab_size=345, num_hidden_layers=1)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    file = {"no_repeat_ngram_size": 1, "suppress_tokens": [7], "repetition_penalty": 1.3, "eos_token_id": None}
    params = [read_sampling_params(file | {"max_new_tokens": NUM_NEW}), SamplingParams(max_new_tokens=NUM_NEW)]
    sampled = SamplingParams(max_new_tokens=NUM_NEW, temperature=1.0, top_k=50, top_p=0.9, seed=5, logprobs=2)
    answers = [
        ours(make_engine(directory, mesh, max_batch_size=3), [PROMPTS[1]] * 3, [*params, sampled])
        for mesh in ("data=1", "tensor=2")
    ]
    assert answers[0] == answers[1]
    assert answers[0][:2] == [theirs(reference, PROMPTS[1], one) for one in (file, {"eos_token_id": None})]


def penalized_greedy(reference, prompt, *, presence, frequency, bias):
    """The greedy answer under the definition of the OpenAI API: logit - count · frequency - (count > 0) · presence."""
    tokens, counts = list(prompt), np.zeros(reference.config.vocab_size)
    for _ in range(NUM_NEW):
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits[0, -1].double().numpy()
        for token, value in bias:
            logits[token] += value
        token = int(np.argmax(logits - counts * frequency - (counts > 0) * presence))
        counts[token] += 1
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2,tensor=4", marks=pytest.mark.slow)])
def test_penalties_and_bias_are_those_of_the_openai_api(directory, reference, plain, mesh):
    rows = [
        {"presence": 2.0, "frequency": 0.0, "bias": ()},
        {"presence": 0.0, "frequency": 1.5, "bias": ()},
        {"presence": -1.0, "frequency": -0.5, "bias": ()},
        {"presence": 0.5, "frequency": 0.7, "bias": ((plain[1][0], -100.0), (7, 2.5), (330, 1.0))},
        {"presence": 0.0, "frequency": 0.0, "bias": ((11, 100.0),)},
    ]
    params = [
        SamplingParams(
            max_new_tokens=NUM_NEW,
            presence_penalty=row["presence"],
            frequency_penalty=row["frequency"],
            logit_bias=row["bias"],
        )
        for row in rows
    ]
    prompt = PROMPTS[1]
    engine = make_engine(directory, mesh)
    assert ours(engine, [prompt] * len(rows), params) == [penalized_greedy(reference, prompt, **row) for row in rows]
    with pytest.raises(UserError, match="logit_bias has token ids outside the vocabulary of 344"):
        engine.check(Request(0, prompt, SamplingParams(logit_bias=((344, 1.0),))))


def test_stop_tokens_of_a_request_wait_for_its_minimum(directory, plain):
    engine, stop = make_engine(directory, "data=1"), plain[1][1]
    limits = {"max_new_tokens": NUM_NEW, "stop_token_ids": (stop,)}
    early, late = ours(engine, [PROMPTS[1]] * 2, [SamplingParams(**limits), SamplingParams(**limits, min_new_tokens=6)])
    assert early == plain[1][:2]
    assert len(late) >= 6 and stop not in late[:6]


def test_several_steps_of_one_dispatch_see_each_others_tokens(directory, reference):
    generation = {"no_repeat_ngram_size": 2, "eos_token_id": None}
    engine = make_engine(directory, "data=1", steps_per_dispatch=5)
    params = read_sampling_params(generation | {"max_new_tokens": NUM_NEW})
    assert ours(engine, PROMPTS, params) == [theirs(reference, prompt, generation) for prompt in PROMPTS]


def test_steps_without_processors_run_the_program_that_has_none(directory):
    engine = make_engine(directory, "data=1")
    plain_params = SamplingParams(max_new_tokens=3)
    ours(engine, PROMPTS[:1], plain_params)
    runner = engine._runner
    before = runner._decode._cache_size()
    ours(engine, PROMPTS[:1], SamplingParams(max_new_tokens=3, presence_penalty=1.0))
    after = runner._decode._cache_size()
    assert after == before + 1
    ours(engine, PROMPTS[:1], plain_params)
    assert runner._decode._cache_size() == after


def test_the_programs_of_greedy_requests_sample_nothing_and_answer_the_same(directory):
    engine = make_engine(directory, "data=1")
    greedy = SamplingParams(max_new_tokens=6)
    answers = ours(engine, PROMPTS, greedy)
    assert not engine._programs_sample
    before = engine._runner._decode._cache_size()
    sampled = SamplingParams(max_new_tokens=6, temperature=1.0, seed=3)
    first, other = ours(engine, [PROMPTS[0]] * 2, [greedy, sampled])
    assert first == answers[0] != other
    after = engine._runner._decode._cache_size()
    assert engine._programs_sample and after > before
    assert ours(engine, PROMPTS, greedy) == answers
    penalised = SamplingParams(max_new_tokens=6, repetition_penalty=1.3)
    fresh = make_engine(directory, "data=1")
    assert ours(fresh, PROMPTS, greedy) == answers
    # A program of greedy requests keeps no table of tokens: a slot that it used before has none of them.
    assert ours(fresh, PROMPTS, penalised) == ours(make_engine(directory, "data=1"), PROMPTS, penalised)


# --- reading ---


@pytest.mark.parametrize(
    "file",
    [
        {"do_sample": True, "temperature": None},
        {"do_sample": True, "top_k": None, "top_p": None, "min_p": None},
        {"do_sample": None, "temperature": 0.3, "top_k": 4},
        {"do_sample": True, "temperature": 0.5, "num_beams": None, "typical_p": None, "max_length": None},
    ],
)
def test_null_is_what_transformers_applies_then(reference, file):
    config, _ = reference._prepare_generation_config(transformers.GenerationConfig(**file))
    params = read_sampling_params(file)
    if config.do_sample:
        assert (params.temperature, params.top_k, params.top_p) == (config.temperature, config.top_k, config.top_p)
    else:
        assert params == SamplingParams()


WRONG = [
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 10**30),
    ("top_k", "5"),
    ("top_k", 2.5),
    ("top_k", True),
    ("top_k", -2),
    ("top_p", {}),
    ("top_p", -0.5),
    ("min_p", [0.1]),
    ("repetition_penalty", 0),
    ("do_sample", "true"),
    ("do_sample", 1),
    ("suppress_tokens", 5),
    ("suppress_tokens", [-1]),
    ("suppress_tokens", [2**31]),
    ("bad_words_ids", [5]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", []),
    ("sequence_bias", [[5, 1.0]]),
    ("sequence_bias", {"5": 1.0}),
    ("no_repeat_ngram_size", -1),
    ("min_new_tokens", "3"),
    ("max_new_tokens", 0),
    ("stop_strings", [""]),
    ("num_beams", 4),
    ("num_beams", True),
    ("num_return_sequences", 2),
    ("guidance_scale", 1.5),
    ("watermarking_config", {"bias": 1}),
    ("exponential_decay_length_penalty", [3, 1.1]),
    ("forced_eos_token_id", 5),
    ("top_h", 0.4),
    ("max_time", 3.0),
    ("never_heard_of", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_what_is_not_understood_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError) as error:
        read_sampling_params({"do_sample": True, key: value})
    assert key in str(error.value) and "--config.model.ignored_config_keys" in str(error.value)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    if key != "do_sample":
        without = read_sampling_params({"do_sample": True})
        assert read_sampling_params({"do_sample": True, key: value}, [key]) == without
        assert read_sampling_params({"do_sample": True, key: value}, [f"generation_config.{key}"]) == without


def test_all_problems_are_listed():
    with pytest.raises(CheckpointError) as error:
        read_sampling_params({"do_sample": True, "temperature": "hot", "top_k": 2.5, "num_beams": 2, "unheard_of": 1})
    assert all(key in str(error.value) for key in ("temperature", "top_k", "num_beams", "unheard_of"))


def test_every_key_of_transformers_is_known_or_refused():
    """Each at its default is accepted; none is missing from the tables by oversight."""
    from qwen_dist.engine import generation_config

    defaults = transformers.GenerationConfig().to_dict() | transformers.GenerationConfig._get_default_generation_params()
    read_sampling_params({key: value for key, value in defaults.items() if key not in ("max_length",)})
    source = inspect.getsource(transformers.GenerationConfig.__init__)
    keys = {line.split('pop("')[1].split('"')[0] for line in source.splitlines() if 'kwargs.pop("' in line}
    known = generation_config._KINDS.keys() | generation_config._HARMLESS | generation_config._NEUTRAL.keys()
    assert keys - known == {
        "constraints",
        "dola_layers",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "max_time",
        "top_h",
        "watermarking_config",
    }


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3"])
def test_the_files_of_released_models_are_read(name):
    files = {
        "Qwen2.5": {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]}
        | {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"},
        "Qwen3": {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
        | {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"},
    }
    assert read_sampling_params(files[name]).top_k == 20
