"""Run and fine-tune Qwen text models in JAX on any mesh of devices.

    from qwen_dist import LLM, SamplingParams
    llm = LLM("Qwen/Qwen3-0.6B")
    print(llm.chat([{"role": "user", "content": "Hi"}], max_new_tokens=20)[0].text)

Importing this package touches no environment variable, no jax setting, no logger and no device.
"""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from qwen_dist.causal_lm import CausalLM, load_model, new_model
    from qwen_dist.config import (
        ChatOptions,
        DataOptions,
        FinetuneConfig,
        LoraOptions,
        ModelOptions,
        OptimizerOptions,
    )
    from qwen_dist.engine.request import SamplingParams
    from qwen_dist.errors import UserError
    from qwen_dist.llm import LLM, Completion, Score
    from qwen_dist.sharding import INFERENCE, TRAIN, RuleSet, use_sharding
    from qwen_dist.tokenizer import Tokenizer
    from qwen_dist.train.batches import TrainBatch
    from qwen_dist.train.run import TrainSummary, finetune

__version__ = "0.1.0"

DEMO_MODEL = _os.path.join(_os.path.dirname(__file__), "demo", "model")
"""The directory of the small demonstration model."""

# The module of each public name, which is imported when the name is first used.
_MODULES = {
    "llm": ("LLM", "Completion", "Score"),
    "engine.request": ("SamplingParams",),
    "causal_lm": ("CausalLM", "load_model", "new_model"),
    "tokenizer": ("Tokenizer",),
    "train.run": ("TrainSummary", "finetune"),
    "train.batches": ("TrainBatch",),
    "sharding": ("INFERENCE", "TRAIN", "RuleSet", "use_sharding"),
    "config": ("ChatOptions", "DataOptions", "FinetuneConfig", "LoraOptions", "ModelOptions", "OptimizerOptions"),
    "errors": ("UserError",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DEMO_MODEL",
    "INFERENCE",
    "LLM",
    "TRAIN",
    "CausalLM",
    "ChatOptions",
    "Completion",
    "DataOptions",
    "FinetuneConfig",
    "LoraOptions",
    "ModelOptions",
    "OptimizerOptions",
    "RuleSet",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "TrainBatch",
    "TrainSummary",
    "UserError",
    "finetune",
    "load_model",
    "new_model",
    "use_sharding",
]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
