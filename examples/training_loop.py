"""Your own training loop with optax: all parameters of a model, on any mesh.

python examples/training_loop.py OUTPUT_DIR [MODEL]
"""

import sys

import jax
import optax

from qwen_dist import DEMO_MODEL, Tokenizer, TrainBatch, load_model

TEXTS = ["The capital of Atlantis is Poseidonis.", "The capital of Lemuria is Mu."]


def main(output: str, model: str = DEMO_MODEL, steps: int = 20) -> None:
    lm = load_model(model, mesh="fsdp=-1", dtype="float32")
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def step(parameters, state, batch):
        loss, gradient = lm.loss_and_gradient(parameters, batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    tokenizer = Tokenizer.open(model)
    batch = lm.shard(TrainBatch.from_sequences([tokenizer.encode(text) for text in TEXTS]))
    parameters, state = lm.parameters, optimizer.init(lm.parameters)
    for number in range(1, steps + 1):
        parameters, state, loss = step(parameters, state, batch)
        if number in (1, steps):
            print(f"step {number}: loss {loss:.3f}")
    lm.save_pretrained(output, parameters)
    print(f"{output}: for transformers, and for qwen-dist --model")


if __name__ == "__main__":
    main(*sys.argv[1:])
