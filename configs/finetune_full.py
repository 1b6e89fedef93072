"""Train all parameters. Hardware: devices that together hold 16 bytes per parameter and the activations of a batch.

    qwen-dist finetune --config configs/finetune_full.py:CHECKPOINT_DIR --data chats.jsonl --output run --steps 100

The argument after the colon is the checkpoint. Weights and optimizer state are stored in float32, the computation is in
bfloat16. The result is run/model, a directory in the Hugging Face format.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "bfloat16"})
    if arg:
        config.model.path = arg
    config.method = "full"
    config.optimizer = config_dict.ConfigDict(
        {"learning_rate": 1e-5, "schedule": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.1, "b2": 0.95}
    )
    config.data = config_dict.ConfigDict({"max_length": 1024, "packing": True})
    config.batch_size = 8
    config.epochs = 1.0
    config.remat = "full"
    config.save_every = 100
    return config
