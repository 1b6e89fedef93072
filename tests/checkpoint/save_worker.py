"""Save two checkpoints alternately to one directory until killed; for test_save.py. One fork per line of input."""

import os
import sys

import jax
import numpy as np

from qwen_dist.checkpoint.save import save

SHAPES = {"embed_tokens.weight": (4000, 64), "layers.0.mlp.up_proj.weight": (1000, 64), "norm.weight": (64,)}


def make_arrays(value):
    return {name: jax.device_put(np.full(shape, value, "float32")) for name, shape in SHAPES.items()}


def save_for_ever(output):
    jax.config.update("jax_platforms", "cpu")
    arrays = {value: make_arrays(value) for value in (1, 2)}
    os.write(1, b"saving\n")
    while True:
        for value in (2, 1):
            save(
                arrays[value],
                output,
                config={"model_type": "qwen3", "value": value},
                extra_files={"tokenizer.json": b"%d" % value},
                max_shard_bytes=300_000,
                overwrite=True,
            )


def main():
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            save_for_ever(sys.argv[1])
        os.write(1, b"%d\n" % child)
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main()
