"""Structured output: answers always have the form that was asked for, and nothing else changes.

Random weights would write anything, so that every constraint is felt.
"""

import json
import random
import re

import jax
import numpy as np
import pytest

from qwen_dist import DEMO_MODEL, LLM, SamplingParams
from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine import structured_output
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, StructuredOutputs
from qwen_dist.engine.structured_output import Grammars
from qwen_dist.errors import UsageError, UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.state import page_bytes
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "number": {"type": "integer", "minimum": -5, "maximum": 1000},
        "word": {"enum": ["fox", "größe", "日本"]},
        "list": {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["ok", "number", "word", "list"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "(" start ")" | NAME\nNAME: /[a-z]{1,3}/'


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    of_list = value["list"]
    return (
        value.keys() == SCHEMA["properties"].keys()
        and isinstance(value["ok"], bool)
        and isinstance(value["number"], int)
        and -5 <= value["number"] <= 1000
        and value["word"] in ("fox", "größe", "日本")
        and 1 <= len(of_list) <= 3
        and set(of_list) == {None}
    )


def is_of_grammar(text: str) -> bool:
    name = text.strip("()")
    depth = (len(text) - len(name)) // 2
    return text == "(" * depth + name + ")" * depth and re.fullmatch("[a-z]{1,3}", name) is not None


FORMS = [
    ({"json": SCHEMA}, is_of_schema),
    ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ({"regex": r"[A-F]{2}-\d{3}( é+!)?"}, lambda text: re.fullmatch(r"[A-F]{2}-\d{3}( é+!)?", text)),
    ({"choice": ["yes", "no", 'a "quoted" \\ one']}, lambda text: text in ("yes", "no", 'a "quoted" \\ one')),
    ({"grammar": GRAMMAR}, is_of_grammar),
]
PROMPTS = [tuple(np.random.default_rng(5).integers(0, 331, length).tolist()) for length in (5, 40, 70, 130)]


@pytest.fixture(scope="module")
def directory(tiny_directory):
    return tiny_directory("qwen3")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.open(directory)


@pytest.fixture(scope="module")
def make_engine(directory, tokenizer):
    def make(mesh: str = "data=1", **options) -> Engine:
        model = load_model(directory, ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE), dtype="float32")
        return Engine(model, tokenizer, **({"max_batch_size": 4} | options))

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO_MODEL, dtype="float32", max_batch_size=4, devices=jax.devices()[:1])


def answers(engine: Engine, requests: list[tuple[tuple[int, ...], SamplingParams]]) -> list[tuple[str, str, list[int]]]:
    """Text, why it ended, and tokens of each answer."""
    found = [["", "", []] for _ in requests]
    for update in engine.run(Request(index, *request) for index, request in enumerate(requests)):
        entry = found[update.request.key]
        entry[0] += update.text
        entry[1] = update.finish_reason or ""
        entry[2] += update.tokens
    return [tuple(entry) for entry in found]


def structured(form, **more) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 60, "temperature": 1.0} | more), structured_outputs=form)


def check_forms(engine: Engine) -> None:
    """Answers with all forms, and some without any, in batches of four."""
    requests = [(PROMPTS[seed % 4], structured(form, seed=seed)) for seed in range(4) for form, _ in FORMS]
    requests += [(prompt, SamplingParams(max_new_tokens=20)) for prompt in PROMPTS]
    found = answers(engine, requests)
    for (text, reason, _), (_, is_valid) in zip(found, FORMS * 4, strict=False):
        assert reason in ("stop", "length") and (reason == "length" or is_valid(text)), text
    # Most JSON objects of random tokens have no end.
    assert [reason for _, reason, _ in found[: 4 * len(FORMS)]].count("stop") >= 14
    assert [tokens for _, _, tokens in found[4 * len(FORMS) :]] == [
        tokens for _, _, tokens in answers(engine, [(prompt, SamplingParams(max_new_tokens=20)) for prompt in PROMPTS])
    ]


def test_answers_have_the_form_that_was_asked_for(engine):
    check_forms(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"mesh": "data=2,tensor=2"}, {"steps_per_dispatch": 5}], ids=["four devices", "several steps"]
)
def test_answers_have_the_form_on_other_engines(make_engine, options):
    check_forms(make_engine(**options))


def test_what_forbids_nothing_changes_nothing(llm):
    """The same tokens and log-probabilities with and without, greedy and drawn, next to an answer with another form."""
    chats = [[{"role": "user", "content": f"What is {n} plus 3?"}] for n in (2, 4)]
    for more in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 3}):
        plain = llm.chat(chats, max_new_tokens=40, logprobs=2, **more)
        params = [
            SamplingParams(max_new_tokens=40, logprobs=2, structured_outputs=form, **more)
            for form in ({"regex": r"(?s:.*)"}, {"regex": r"(?s:.*)"}, {"choice": ["7", "9"]})
        ]
        free = llm.chat([*chats, chats[0]], params)
        assert [one.token_ids for one in free[:2]] == [one.token_ids for one in plain]
        assert free[2].text in ("7", "9")
        for one, other in zip(free, plain, strict=False):
            assert [entry.logprob for entry in one.logprobs] == pytest.approx(
                [entry.logprob for entry in other.logprobs], abs=1e-5
            )
            assert [entry.top[0][0] for entry in one.logprobs] == [entry.top[0][0] for entry in other.logprobs]


@pytest.mark.slow
def test_a_warm_engine_compiles_nothing_for_any_kind_of_request(make_engine):
    engine = make_engine(max_batch_size=2)
    engine.warm_up(for_all=True)
    runner = engine._runner
    programs = [runner._prefill, runner._decode, runner._compute, runner._sample_full]
    before = [program._cache_size() for program in programs]
    assert before == [3, 2, 8, 5]
    kinds = [{}, {"logprobs": 3}, {"presence_penalty": 1.0}, {"logit_bias": ((7, 5.0),), "logprobs": 0}]
    kinds += [{"prompt_logprobs": 2, "logprobs": 2}, {"structured_outputs": {"choice": ["a", "b"]}}]
    kinds += [{"structured_outputs": {"regex": "a+"}, "logprobs": 20, "min_new_tokens": 3, "repetition_penalty": 1.2}]
    for prompt in PROMPTS[:3]:
        answers(engine, [(prompt, SamplingParams(max_new_tokens=5, **kind)) for kind in kinds])
    assert [program._cache_size() for program in programs] == before


def test_an_answer_that_is_cut_says_so(engine):
    ((text, reason, tokens),) = answers(engine, [(PROMPTS[0], structured({"json": SCHEMA}, max_new_tokens=3))])
    assert (reason, len(tokens)) == ("length", 3) and text


def test_bans_that_leave_nothing_do_not_count(engine, tokenizer):
    """The only first tokens of "yes" are banned, and the end is banned for longer than the answer is."""
    banned = tuple({tokenizer.encode(text)[0] for text in ("y", "ye", "yes")})
    params = structured({"choice": ["yes"]}, begin_suppress_tokens=banned, min_new_tokens=30, temperature=0.0)
    assert [answer[:2] for answer in answers(engine, [(PROMPTS[1], params)])] == [("yes", "stop")]


def test_a_form_that_begins_after_the_reasoning(engine, tokenizer):
    (end,) = tokenizer.encode("</think>")
    form = {"choice": ["yes", "no"], "after": "</think>"}
    free = structured(form, max_new_tokens=12, seed=1)
    ends_at_once = structured(form, logit_bias=((end, 100.0),))
    (text, reason, tokens), (other, *_) = answers(engine, [(PROMPTS[0], free), (PROMPTS[0], ends_at_once)])
    assert reason == "length" and len(tokens) == 12, "the end of the text must not come before the form"
    assert text not in ("yes", "no") and other in ("</think>yes", "</think>no")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_preempted_and_cached_answers_are_the_same(tiny_directory, family):
    """A cache of few pages, in which prompts with a common beginning push each other out."""
    directory = tiny_directory(family)
    tokenizer = Tokenizer.open(directory)
    model = load_model(directory, ShardingContext(make_mesh(MeshConfig.parse("data=1")), INFERENCE), dtype="float32")
    one = sum(page_bytes(state_specs(model.config, model.dtype), model.sharding_ctx))
    common = tuple(np.random.default_rng(0).integers(0, 331, 5 * PAGE).tolist())
    form = {"regex": r"[ab]{90}"}
    requests = [((*common, n), structured(form, seed=n, max_new_tokens=120)) for n in range(6)]
    more = {"cache_bytes": 11 * one} if family == "qwen3" else {"cache_bytes": 40 * one}
    small, large = Engine(model, tokenizer, max_batch_size=4, **more), Engine(model, tokenizer, max_batch_size=4)
    without = Engine(model, tokenizer, max_batch_size=4, prefix_cache=False)
    found = answers(small, requests)
    assert found == answers(large, requests) == answers(without, requests)
    assert all(re.fullmatch("[ab]{90}", text) for text, *_ in found)
    assert family != "qwen3" or small.stats.num_preempted > 0


def test_what_cannot_be_used_is_refused(engine, monkeypatch):
    wrong = [
        ({"json": {"type": "nothing"}}, "the JSON schema for structured output cannot be used: "),
        ({"json": "{"}, "the JSON schema for structured output cannot be used: "),
        ({"regex": "("}, "the regular expression for structured output cannot be used: "),
        ({"grammar": "start: unknown"}, "the grammar for structured output cannot be used: "),
        ({"regex": "a", "after": "two words"}, "cannot begin after two words, which is no single token"),
    ]
    for form, message in wrong:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            engine.check(Request(0, PROMPTS[0], structured(form)))
        assert "\n" not in str(error.value)
    for form in ({}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": [""]}):
        with pytest.raises(UsageError, match="structured_outputs"):
            StructuredOutputs(**form)
    monkeypatch.setattr(structured_output, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"structured output needs no_such_package: pip install 'qwen-dist\[structured\]'"):
        engine.check(Request(0, PROMPTS[0], structured({"regex": "never asked for before"})))


# --- many schemas, without a model ---


def random_schema(draw: random.Random, depth: int = 0) -> dict:
    kinds = ["integer", "boolean", "enum", "string", "null", "anyOf"] + (["object", "array"] * 3 if depth < 3 else [])
    kind = draw.choice(kinds) if depth else "object"
    if kind == "integer":
        low = draw.randrange(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(500)}
    if kind == "enum":
        return {"enum": draw.sample(["a", 'b"', "\\", "é\n", 5, -1.5, None, True], draw.randint(1, 5))}
    if kind == "string":
        low = draw.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(8)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 2) for _ in range(draw.randint(1, 3))]}
    if kind == "array":
        low = draw.randrange(3)
        return {"type": "array", "items": random_schema(draw, depth + 1), "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = draw.sample(["a", "b c", 'd"', "größe", "日本", "f_1"], draw.randint(0, 5))
        required = [name for name in names if draw.random() < 0.6]
        properties = {name: random_schema(draw, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def has_schema(value, schema: dict) -> bool:
    if "anyOf" in schema:
        return any(has_schema(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        if not isinstance(value, dict) or not set(schema["required"]) <= value.keys() <= properties.keys():
            return False
        return all(has_schema(one, properties[name]) for name, one in value.items())
    if kind == "array":
        is_list = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return is_list and all(has_schema(one, schema["items"]) for one in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


def random_answer(grammars: Grammars, tokenizer: Tokenizer, form, draw: random.Random) -> str:
    """Draw tokens that are allowed until the end."""
    constraint, tokens = grammars.constraint(structured(form)), []
    while True:
        (words,) = grammars.allowed([constraint])
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        token = draw.choice(allowed.tolist())
        if token in tokenizer.stop_ids:
            assert not constraint.has_failed, constraint.matcher.get_error()
            return b"".join(map(tokenizer.token_bytes, tokens)).decode()
        tokens.append(token)
        constraint.accept([token])


@pytest.mark.parametrize("text", ["e\u0301", "é", "<|im_end|>", "<think>", "a\u212b日"])
def test_texts_that_the_tokenizer_changes_are_written_as_they_are(tokenizer, text):
    """It composes accents, and has tokens for some of these texts which are no text, or another one."""
    answer = random_answer(Grammars(tokenizer, 344), tokenizer, {"choice": [text]}, random.Random(0))
    assert answer == text


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_schemas_are_always_kept(tokenizer, count):
    grammars = Grammars(tokenizer, 344)
    for seed in range(count):
        draw = random.Random(seed)
        schema = random_schema(draw)
        answer = random_answer(grammars, tokenizer, {"json": schema}, draw)
        assert has_schema(json.loads(answer), schema), (seed, schema, answer)
