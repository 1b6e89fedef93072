"""Answer the lines of a file from Python, all at a time, and write JSON lines. (`qwen-dist batch` also resumes.)

python examples/batch_in_python.py INPUT.txt OUTPUT.jsonl [MODEL]
"""

import json
import sys
from pathlib import Path

from qwen_dist import DEMO_MODEL, LLM, UserError


def main(source: str, output: str, model: str = DEMO_MODEL) -> None:
    llm = LLM(model, dtype="float32", max_batch_size=96)
    questions = Path(source).read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": question}] for question in questions]
    try:
        answers = llm.chat(chats, temperature=0, max_new_tokens=64)
    except UserError as error:  # every prompt is checked before the first is run
        sys.exit(str(error))
    with open(output, "w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers, strict=True):
            file.write(json.dumps({"question": question, "answer": answer.text}, ensure_ascii=False) + "\n")
    print(f"{len(answers)} answers in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
