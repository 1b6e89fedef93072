"""The settings that results depend on, and OUTPUT.manifest.json, the description of the last run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from typing import Any

import qwen_dist
from qwen_dist.batch.output import journal_path, local_path
from qwen_dist.batch.run import BatchSummary
from qwen_dist.config import BatchConfig
from qwen_dist.errors import UsageError, printable
from qwen_dist.json_reader import read_json_object
from qwen_dist.ops.native_library import active_build
from qwen_dist.runtime.preflight import checkpoint_digest, checkpoint_files
from qwen_dist.storage.line_writer import write_lines

# The kind and version of the file.
MANIFEST_FORMAT = "qwen-dist batch 1"


def result_settings(config: BatchConfig) -> dict[str, Any]:
    """Return the settings that results depend on besides their records; a change makes an output unusable for resuming."""
    return {
        "checkpoint": _digest_or_name(config.model.path),
        "adapter": _digest_or_name(config.model.adapter),
        "dtype": config.model.dtype,
        "load_format": config.model.load_format,
        "sampling": dataclasses.asdict(config.sampling),
        "chat": config.chat.variables,
        "raw": config.raw,
    }


def _digest_or_name(location: str) -> str:
    """Return a hash of the files in a directory; the name of any other location."""
    files = checkpoint_files(location)
    return checkpoint_digest(files) if files else location


def write_manifest(config: BatchConfig, settings: dict[str, Any], summary: BatchSummary, *, is_complete: bool) -> None:
    """Write the configuration, versions, counts and speed of this run."""
    seconds = max(summary.seconds, 1e-9)
    manifest = {
        "format": MANIFEST_FORMAT,
        "is_complete": is_complete,
        "config": dataclasses.asdict(config),
        "settings": settings,
        "versions": {"qwen-dist": qwen_dist.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "tokenizers")},
        "cpu_kernels": active_build(),
        "counts": dataclasses.asdict(summary),
        "tokens_per_second": {
            "read": round(summary.num_prompt_tokens / seconds, 1),
            "written": round(summary.num_generated_tokens / seconds, 1),
        },
    }
    write_lines(manifest_path(config.output), [json.dumps(manifest, indent=2).encode()])


def manifest_path(output: str) -> str:
    """Return the path of the manifest of a run with this output."""
    return f"{local_path(output)}.manifest.json"


def check_manifest(output: str) -> None:
    """Raise UsageError if there is a file under the manifest's name that no run has written.

    A damaged one of a run that has a journal is written again.
    """
    path = manifest_path(output)
    try:
        found = read_json_object(path, error=UsageError).get("format")
    except FileNotFoundError:
        return
    except UsageError as error:
        if os.path.isfile(path) and os.path.exists(journal_path(output)):
            return
        raise UsageError(f"{error}; it would be overwritten: move it away, or name another output") from None
    if found != MANIFEST_FORMAT:
        raise UsageError(
            f"{printable(path)} is not a manifest of this version of qwen-dist ({MANIFEST_FORMAT}), and would be "
            "overwritten: move it away, or name another output"
        )
