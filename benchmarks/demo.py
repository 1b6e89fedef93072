"""Count how often the demonstration model is right, by kind of question; it was not trained on those about numbers.

    python benchmarks/demo.py [--count 200]

An answer is right if it equals the expected one exactly (qwen_dist/demo/questions.py). Decoding is greedy.
"""

from __future__ import annotations

import argparse
import pathlib

import qwen_dist.demo
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.demo.questions import COMPUTED_KINDS, Question, held_out_questions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.tokenizer import Tokenizer

MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--count", type=int, default=200, help="maximum number of questions of each kind")
    options = parser.parse_args()
    engine, tokenizer, params = open_engine(ModelOptions(options.model), "", SamplingOptions())
    for kind, (right, total) in score(engine, tokenizer, params, options.count).items():
        how = "worked out" if kind in COMPUTED_KINDS else "by heart"
        print(f"{kind:12} {right:4} of {total:4} right ({100 * right / total:.1f}%), {how}")


def score(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, count: int) -> dict[str, tuple[int, int]]:
    """Return the number of right answers and of questions, by kind of question."""
    questions = [question for of_kind in held_out_questions(count).values() for question in of_kind]
    answers = dict.fromkeys(questions, "")

    def request(question: Question) -> Request:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question.text}])
        return Request(question, tuple(prompt), params)

    for update in engine.run([request(question) for question in questions]):
        answers[update.request.key] += update.text
    kinds = dict.fromkeys(question.kind for question in questions)
    of_kind = {kind: [question for question in questions if question.kind == kind] for kind in kinds}
    return {kind: (sum(answers[q] == q.answer for q in asked), len(asked)) for kind, asked in of_kind.items()}


if __name__ == "__main__":
    main()
