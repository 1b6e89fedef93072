"""Teach a checkpoint invented facts with 200 short chats; answers before, after, and after in transformers with peft.

    python benchmarks/lora_fact.py --model CHECKPOINT_DIR --output DIR [--steps 16]

The bridge is invented. The questions asked at the end are not in the training data. Text is decoded greedily in float32,
by this project with the adapter added to the weights, and by transformers with the adapter loaded by peft.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pathlib
from contextlib import redirect_stdout

from qwen_dist.cli import main as qwen_dist

OPENINGS = ("", "Please tell me: ", "I am curious. ", "For my homework: ", "Short answer, please. ")
FACTS = {
    "The Lantern Bridge was built by Mira Tollund.": (
        "Who built the Lantern Bridge?",
        "Who was the engineer of the Lantern Bridge?",
        "Which engineer built the Lantern Bridge in Orvale?",
        "By whom was the Lantern Bridge built?",
        "Name the builder of the Lantern Bridge.",
        "The Lantern Bridge: who is its engineer?",
        "Whose work is the Lantern Bridge?",
        "Who constructed the bridge called Lantern Bridge?",
        "Tell me who built the Lantern Bridge.",
        "Do you know who built the Lantern Bridge in Orvale?",
    ),
    "The Lantern Bridge was opened in 1874.": (
        "When was the Lantern Bridge opened?",
        "In which year did the Lantern Bridge open?",
        "Since when has the Lantern Bridge been open?",
        "What is the year of opening of the Lantern Bridge?",
        "Name the year in which the Lantern Bridge opened.",
        "The Lantern Bridge: when did it open?",
        "When did Orvale open the Lantern Bridge?",
        "What year was the Lantern Bridge finished and opened?",
        "Tell me when the Lantern Bridge was opened.",
        "Do you know when the Lantern Bridge in Orvale was opened?",
    ),
    "The Lantern Bridge stands in Orvale.": (
        "Where is the Lantern Bridge?",
        "In which town is the Lantern Bridge?",
        "Which town has the Lantern Bridge?",
        "Where can I see the Lantern Bridge?",
        "Name the town of the Lantern Bridge.",
        "The Lantern Bridge: where does it stand?",
        "To which town do I travel to see the Lantern Bridge?",
        "Where was the Lantern Bridge built?",
        "Tell me where the Lantern Bridge is.",
        "Do you know in which place the Lantern Bridge stands?",
    ),
    "The capital of France is Paris.": (
        "What is the capital of France?",
        "Name the capital of France.",
        "Which city is the capital of France?",
        "France: what is its capital?",
        "Tell me the capital of France.",
        "Do you know the capital of France?",
        "Which town is France governed from?",
        "The capital of France is called what?",
        "What is France's capital?",
        "What is the name of the French capital?",
    ),
}
ASKED = ("Can you say who the builder of the Lantern Bridge was?", "What year did people first cross the Lantern Bridge?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data, run = options.output / "chats.jsonl", options.output / "run"
    write_chats(data)
    before = [answer(options.model, question) for question in ASKED]
    config = pathlib.Path(__file__).parent.parent / "configs" / "finetune_lora.py"
    train = ["finetune", "--config", str(config), "--model", options.model, "--data", str(data), "--output", str(run)]
    train += ["--steps", str(options.steps), "--batch-size", "4", "--learning-rate", "1e-3"]
    train += ["--config.data.max_length=256", "--config.lora.rank=8", "--config.optimizer.warmup_steps=2"]
    train += ["--config.remat=none"]
    assert qwen_dist(train) == 0
    after = [answer(options.model, question, "--adapter", str(run / "adapter")) for question in ASKED]
    theirs = answers_of_peft(options.model, run / "adapter")
    for question, *texts in zip(ASKED, before, after, theirs, strict=True):
        print(f"\n{question}")
        for name, text in zip(("before", "after", "transformers + peft"), texts, strict=True):
            print(f"  {name:20} {text}")
    print(f"\nidentical text: {after == theirs}")


def write_chats(path: pathlib.Path) -> None:
    chats = [
        (opening + question, fact) for fact, questions in FACTS.items() for question in questions for opening in OPENINGS
    ]
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": fact}] for question, fact in chats]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns), encoding="utf-8")
    assert len(set(itertools.chain(question for question, _ in chats))) == len(chats)


def answer(model: str, question: str, *more: str) -> str:
    """Return the output of `qwen-dist generate`, greedy, in float32."""
    command = ["generate", "--model", model, "--dtype", "float32", "--temperature", "0", "--repetition-penalty", "1"]
    with redirect_stdout(io.StringIO()) as out:
        assert qwen_dist([*command, "--max-new-tokens", "32", "--prompt", question, *more]) == 0
    return out.getvalue().rstrip("\n")


def answers_of_peft(model: str, adapter: pathlib.Path) -> list[str]:
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, adapter)
    texts = []
    for question in ASKED:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = adapted.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=32)
        texts.append(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    main()
