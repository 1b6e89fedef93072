"""Train a LoRA adapter in your own loop, save it for peft, and answer with it.

python examples/lora.py OUTPUT_DIR [MODEL]
"""

import sys

import jax
import optax

from qwen_dist import DEMO_MODEL, LLM, LoraOptions, Tokenizer, TrainBatch, load_model

CHAT = [
    {"role": "user", "content": "What is the capital of Atlantis?"},
    {"role": "assistant", "content": "Poseidonis."},
]


def main(output: str, model: str = DEMO_MODEL, steps: int = 30) -> None:
    tokenizer = Tokenizer.open(model)
    prompt = tokenizer.apply_chat_template(CHAT[:1])
    tokens = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    loss_mask = [0] * len(prompt) + [1] * (len(tokens) - len(prompt))  # learn the answer only

    base = load_model(model, mesh="fsdp=-1", dtype="float32")
    lm, names = base.with_lora(LoraOptions(rank=8, alpha=16.0, target_modules=("all-linear",)))
    frozen = {name: value for name, value in lm.parameters.items() if name not in names}
    trained = {name: lm.parameters[name] for name in names}
    optimizer = optax.adamw(5e-3)

    @jax.jit
    def step(trained, state, frozen, batch):
        loss, gradient = lm.loss_and_gradient(trained, batch, frozen)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    batch, state = lm.shard(TrainBatch.from_sequences([tokens], [loss_mask])), optimizer.init(trained)
    for _ in range(steps):
        trained, state, loss = step(trained, state, frozen, batch)
    lm.save_pretrained(output, frozen | trained)
    print(f"loss {loss:.4f}; adapter in {output}")

    answer = LLM(model, adapter=output, dtype="float32").chat(CHAT[:1], temperature=0, max_new_tokens=16)[0]
    print(f"{CHAT[0]['content']} {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
