"""Train the package's demonstration model from random weights. Hardware: a laptop's CPU.

    python -m qwen_dist.demo.questions --output demo.jsonl --count 60000
    python -m qwen_dist.demo.make --data demo.jsonl --output untrained
    qwen-dist finetune --config configs/demo.py --model untrained --data demo.jsonl --output demo
    qwen-dist export --model demo/model --output qwen_dist/demo/model --dtype bfloat16

qwen_dist/demo/questions.py generates the text, under this project's licence. The first 233 steps of the model in the
package were run with `--steps 500`, so the learning rate fell more slowly; the run was then resumed up to step 300: a loss
of 0.0096, at about 2 s a step on two cores. `python benchmarks/demo.py` counts how often it is right.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "float32", "load_format": "dummy"})
    if arg:
        config.model.path = arg
    config.method = "full"
    config.optimizer = config_dict.ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.05, "b2": 0.98}
    )
    config.data = config_dict.ConfigDict({"max_length": 128, "packing": True})
    config.batch_size = 32
    config.steps = 300
    config.save_every = 100
    return config
