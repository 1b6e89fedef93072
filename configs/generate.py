"""Answer a prompt, or chat. Hardware: anything that holds the weights, from one CPU.

    qwen-dist generate --config configs/generate.py:CHECKPOINT_DIR --prompt "Why is the sky blue?"

The argument behind the colon is the checkpoint. What is not set here comes from the checkpoint's generation_config.json.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "bfloat16"})
    if arg:
        config.model.path = arg
    config.mesh = ""
    config.sampling = config_dict.ConfigDict({"max_new_tokens": 512})
    return config
