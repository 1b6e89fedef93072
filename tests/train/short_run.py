"""The configuration of a short run of a small model."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from qwen_dist.config import FinetuneConfig, bind_config


def short_run(model: pathlib.Path, data: pathlib.Path, output: pathlib.Path, changes: Mapping[str, Any]) -> FinetuneConfig:
    """Four steps on one device, with `changes`, whose keys may have dots."""
    values: dict[str, Any] = {"mesh": "data=1", "batch_size": 4, "steps": 4, "output": str(output)}
    fixed = {"model.path": str(model), "data.files": (str(data),), "data.max_length": 64, "lora.rank": 4}
    for key, value in {**fixed, **changes}.items():
        *parents, name = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return bind_config(FinetuneConfig, values)
