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
    held_out_questions,
    is_held_out,
    to_record,
    training_questions,
)

MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"


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


def test_it_compares_and_sorts_unseen_numbers(tmp_path):
    """The counts of all kinds are in docs/finetune.md, printed by `python benchmarks/demo.py`."""
    held_out = held_out_questions(12)
    questions = held_out["comparison"] + held_out["sorted list"]
    lines = [json.dumps({"id": str(number), "prompt": question.text}) for number, question in enumerate(questions)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert main(["batch", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 0
    answers = {line["id"]: line["text"] for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    right = sum(answers[str(number)] == question.answer for number, question in enumerate(questions))
    assert right >= 0.8 * len(questions)


@pytest.mark.parametrize("module", ["questions", "make"])
def test_its_training_data_can_be_generated_again(module, tmp_path):
    data = tmp_path / "demo.jsonl"
    commands = {
        "questions": ["--output", str(data), "--count", "50"],
        "make": ["--data", str(data), "--output", str(tmp_path / "untrained")],
    }
    for name in ("questions", module):
        subprocess.run([sys.executable, "-m", f"qwen_dist.demo.{name}", *commands[name]], check=True)
    assert len(data.read_text().splitlines()) == 50
    if module == "make":
        assert json.loads((tmp_path / "untrained" / "config.json").read_text())["model_type"] == "qwen3"
