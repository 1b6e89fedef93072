"""Answer every line of a file. Hardware: any that holds the weights; for several devices set the mesh.

    qwen-dist batch --config configs/batch.py:CHECKPOINT_DIR --input prompts.jsonl --output answers.jsonl

The argument after the colon is the checkpoint. A record's own parameters override these.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "bfloat16"})
    if arg:
        config.model.path = arg
    config.mesh = ""
    config.sampling = config_dict.ConfigDict({"max_new_tokens": 512})
    config.engine = config_dict.ConfigDict({"policy": "throughput", "max_batch_size": 96})
    return config
