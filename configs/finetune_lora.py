"""Train a low-rank adapter. Hardware: a CPU is enough; the weights and the activations of a batch must fit.

    qwen-dist finetune --config configs/finetune_lora.py:CHECKPOINT_DIR --data chats.jsonl --output run --steps 100

The argument after the colon is the checkpoint. The result is run/adapter, in the layout of peft.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "bfloat16"})
    if arg:
        config.model.path = arg
    config.method = "lora"
    config.lora = config_dict.ConfigDict({"rank": 16, "alpha": 32.0})
    config.optimizer = config_dict.ConfigDict({"learning_rate": 2e-4, "schedule": "cosine", "warmup_ratio": 0.1})
    config.data = config_dict.ConfigDict({"max_length": 1024, "packing": True})
    config.batch_size = 8
    config.epochs = 1.0
    config.remat = "full"
    config.save_every = 100
    return config
