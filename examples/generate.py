"""Answer prompts and chats, stream an answer, and score texts.

python examples/generate.py [MODEL]
"""

import sys

from qwen_dist import DEMO_MODEL, LLM, SamplingParams


def main(model: str = DEMO_MODEL) -> None:
    llm = LLM(model, dtype="float32")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    print("chat:  ", llm.chat(question, temperature=0)[0].text)

    # Many prompts at a time. A sampled answer depends on its prompt and seed alone.
    prompts = ["The sky is", "One, two, three,"]
    for prompt, answer in zip(
        prompts, llm.generate(prompts, SamplingParams(max_new_tokens=8, temperature=0.7, seed=1)), strict=True
    ):
        print(f"prompt: {prompt!r} → {answer.text!r} ({answer.finish_reason})")

    print("stream: ", end="")
    for text in llm.stream(question):
        print(text, end="", flush=True)
    print()

    for text, score in zip(prompts, llm.score(prompts), strict=True):
        print(f"score:  {text!r} has log-probability {score.total:.2f} over {len(score.logprobs)} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
