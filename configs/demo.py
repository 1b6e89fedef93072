"""Train the package's demonstration model from random weights. Hardware: a laptop's CPU.

    python -m qwen_dist.demo.questions --output own.jsonl --count 60000 --other-share 0
    python -m qwen_dist.demo.make --data own.jsonl --output untrained
    qwen-dist finetune --config configs/demo.py --model untrained --data own.jsonl --output first
    python -m qwen_dist.demo.questions --output all.jsonl --count 60000 --seed 1
    qwen-dist finetune --config configs/demo.py:first/model --data all.jsonl --output demo --steps 700
    qwen-dist export --model demo/model --output qwen_dist/demo/model --dtype bfloat16

qwen_dist/demo generates the text, under this project's licence. The first run learns the questions that the model can
answer; the second starts from its weights and adds all other prompts: a loss of 0.0018, at about 1.5 s a step on two
cores. The first run of the model in the package was made with rows of 128 tokens; 233 of its 300 steps were run with
`--steps 500`, so the learning rate fell more slowly. `python benchmarks/demo.py` counts how often the model is right.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    """Return the first run's configuration; with the directory of its model as `arg`, the second run's."""
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "float32", "load_format": "dummy"})
    config.method = "full"
    config.optimizer = config_dict.ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.05, "b2": 0.98}
    )
    if arg:
        config.model = config_dict.ConfigDict({"dtype": "float32", "path": arg})
        config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 20})
    config.data = config_dict.ConfigDict({"max_length": 512, "packing": True})
    config.batch_size = 8
    config.steps = 300
    config.save_every = 100
    return config
