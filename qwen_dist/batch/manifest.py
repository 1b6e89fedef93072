"""What a batch is: the settings that its answers depend on, and, in OUTPUT.manifest.json, what was done."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from typing import Any

import qwen_dist
from qwen_dist.batch.output import local_path
from qwen_dist.batch.run import Summary
from qwen_dist.config import BatchConfig
from qwen_dist.ops import native
from qwen_dist.runtime.preflight import checkpoint_digest, checkpoint_files


def settings_of(config: BatchConfig) -> dict[str, Any]:
    """What answers depend on besides their records."""
    return {
        "checkpoint": _content(config.model.path),
        "adapter": _content(config.model.adapter),
        "dtype": config.model.dtype,
        "load_format": config.model.load_format,
        "sampling": dataclasses.asdict(config.sampling),
        "raw": config.raw,
    }


def _content(place: str) -> str:
    """A hash of the files there; a place that is no directory here is known by its name alone."""
    files = checkpoint_files(place)
    return checkpoint_digest(files) if files else place


def write_manifest(config: BatchConfig, settings: dict[str, Any], summary: Summary, *, is_complete: bool) -> None:
    """Write what was asked for, with which versions, and what came of it in this run."""
    seconds = max(summary.seconds, 1e-9)
    manifest = {
        "is_complete": is_complete,
        "config": dataclasses.asdict(config),
        "settings": settings,
        "versions": {"qwen-dist": qwen_dist.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "tokenizers")},
        "kernels": native.is_available(),
        "counts": dataclasses.asdict(summary),
        "tokens_per_second": {
            "read": round(summary.num_prompt_tokens / seconds, 1),
            "written": round(summary.num_generated_tokens / seconds, 1),
        },
    }
    with open(f"{local_path(config.output)}.manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
