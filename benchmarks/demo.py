"""Count how often the demonstration model is right, by kind of question; it was not trained on those about numbers.

    python benchmarks/demo.py [--count 200]

An answer is right if it equals the expected one exactly (qwen_dist/demo/questions.py). Decoding is greedy. Other prompts
are those of benchmarks/demo_prompts.jsonl, written by hand; the model was trained on generated ones.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import qwen_dist.demo
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.demo.questions import COMPUTED_KINDS, OTHER_ANSWER, OTHER_KIND, Question, held_out_questions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.tokenizer import Tokenizer

MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"
OTHER_PROMPTS = pathlib.Path(__file__).parent / "demo_prompts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--wrong", action="store_true", help="also print the wrong answers")
    parser.add_argument("--count", type=int, default=200, help="maximum number of questions of each kind")
    options = parser.parse_args()
    engine, tokenizer, params = open_engine(ModelOptions(options.model), "", SamplingOptions())
    questions = held_out_questions(options.count) | {OTHER_KIND: other_prompts()}
    answers = answer(engine, tokenizer, params, [question for of_kind in questions.values() for question in of_kind])
    for kind, asked in questions.items():
        wrong = [question for question in asked if answers[question] != question.answer]
        right, how = len(asked) - len(wrong), "worked out" if kind in COMPUTED_KINDS else "by heart"
        how = "unseen" if kind == OTHER_KIND else how
        print(f"{kind:13} {right:4} of {len(asked):4} right ({100 * right / len(asked):.1f}%), {how}")
        if options.wrong:
            print("".join(f"    {question.text!r}: {answers[question]!r}\n" for question in wrong), end="")


def other_prompts() -> list[Question]:
    """Return the prompts of OTHER_PROMPTS as questions."""
    prompts = [json.loads(line)["prompt"] for line in OTHER_PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [Question(OTHER_KIND, prompt, prompt, OTHER_ANSWER) for prompt in prompts]


def answer(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, questions: list[Question]) -> dict[Question, str]:
    """Return the answer to each question."""
    answers = dict.fromkeys(questions, "")

    def request(question: Question) -> Request:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question.text}])
        return Request(question, tuple(prompt), params)

    for update in engine.run([request(question) for question in questions]):
        answers[update.request.key] += update.text
    return answers


if __name__ == "__main__":
    main()
