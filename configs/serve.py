"""Serve the OpenAI API. Hardware: any that holds the weights; for several devices set the mesh.

    qwen-dist serve --config configs/serve.py:CHECKPOINT_DIR --port 8000

The argument after the colon is the checkpoint. A request's own parameters override these.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.model = config_dict.ConfigDict({"dtype": "bfloat16"})
    if arg:
        config.model.path = arg
    config.mesh = ""
    config.sampling = config_dict.ConfigDict({"max_new_tokens": 2048})
    config.engine = config_dict.ConfigDict({"policy": "latency", "max_batch_size": 32, "kv_cache_memory": "4GB"})
    return config
