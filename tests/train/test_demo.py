"""The demonstration model in the package."""

import json
import pathlib
import subprocess
import sys

import pytest

import qwen_dist.demo
from qwen_dist.cli import main
from qwen_dist.demo.questions import (
    COMPUTED_KINDS,
    EXPLANATIONS,
    OTHER_ANSWER,
    held_out_questions,
    is_held_out,
    to_record,
    training_questions,
)

MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"
# Written by hand, as input of `batch`.
OTHER_PROMPTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "demo_prompts.jsonl"


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_no_counted_question_was_trained_on():
    trained = {(question.kind, question.key) for question in training_questions(5000)}
    counted = held_out_questions(20)
    assert set(COMPUTED_KINDS) < counted.keys()
    assert not trained & {(question.kind, question.key) for kind in COMPUTED_KINDS for question in counted[kind]}
    assert all(is_held_out(question) for kind in COMPUTED_KINDS for question in counted[kind])
    assert to_record(counted["comparison"][0])["messages"][1]["role"] == "assistant"


def test_it_answers_without_the_model_flag(capsys):
    question = "Why is the sky blue?"
    assert main(["generate", "--prompt", question]) == 0
    assert capsys.readouterr().out == EXPLANATIONS[question] + "\n"


def test_it_answers_what_it_can_do(capsys):
    question = "What can you do?"
    assert main(["generate", "--prompt", question]) == 0
    assert capsys.readouterr().out == EXPLANATIONS[question] + "\n"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The answers to questions and to the other prompts, by text."""
    folder, held_out = tmp_path_factory.mktemp("answers"), held_out_questions(12)
    prompts = [question.text for kind in COUNTED for question in held_out[kind]]
    prompts += [json.loads(line)["prompt"] for line in OTHER_PROMPTS.read_text(encoding="utf-8").splitlines()]
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"id": n, "prompt": text}) for n, text in enumerate(prompts)))
    paths = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    assert main(["batch", *paths, "--mesh", "data=1"]) == 0
    lines = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    return {prompts[line["id"]]: line["text"] for line in lines}


COUNTED = ("comparison", "sorted list")


@pytest.mark.slow
def test_it_compares_and_sorts_unseen_numbers(answers):
    """The counts of all kinds are in docs/finetune.md, printed by `python benchmarks/demo.py`."""
    questions = [question for kind in COUNTED for question in held_out_questions(12)[kind]]
    assert sum(answers[question.text] == question.answer for question in questions) >= 0.8 * len(questions)


def test_it_says_what_it_can_do_to_any_other_prompt(answers):
    prompts = [json.loads(line)["prompt"] for line in OTHER_PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == 100
    assert sum(answers[prompt] == OTHER_ANSWER for prompt in prompts) >= 95
    assert "--model" in OTHER_ANSWER and OTHER_ANSWER.count(". ") == 0, "one sentence, which names the flag"


def test_no_other_prompt_was_trained_on():
    trained = {question.text.lower() for question in training_questions(20_000)}
    prompts = {json.loads(line)["prompt"].lower() for line in OTHER_PROMPTS.read_text(encoding="utf-8").splitlines()}
    assert not trained & prompts


def test_questions_that_it_knows_are_not_other_prompts():
    """Also those that a form of other prompts happens to make."""
    known = {question.text for of_kind in held_out_questions(200).values() for question in of_kind}
    others = {question.text for question in training_questions(5000, other_share=1.0)}
    assert len(others) > 4000 and not known & others


@pytest.mark.parametrize("module", ["questions", "make"])
def test_its_training_data_can_be_generated_again(module, tmp_path):
    data = tmp_path / "demo.jsonl"
    commands = {
        "questions": ["--output", str(data), "--count", "50"],
        "make": ["--data", str(data), "--output", str(tmp_path / "untrained")],
    }
    for name in ("questions", module):
        subprocess.run([sys.executable, "-m", f"qwen_dist.demo.{name}", *commands[name]], check=True)
    records = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    assert sum(message["role"] == "user" for messages in records for message in messages) == 50
    if module == "make":
        assert json.loads((tmp_path / "untrained" / "config.json").read_text())["model_type"] == "qwen3"
