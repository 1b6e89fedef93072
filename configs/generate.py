"""Answer a prompt, or chat. Hardware: any that holds the weights, from one CPU up.

    qwen-dist generate --config configs/generate.py:CHECKPOINT_DIR --prompt "Why is the sky blue?"

The argument after the colon is the checkpoint. Values not set here come from the checkpoint's generation_config.json.
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
