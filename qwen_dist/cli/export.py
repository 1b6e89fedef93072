"""`qwen-dist export`: load a checkpoint and save it in the format of transformers."""

from __future__ import annotations

import json

from qwen_dist.cli.console import loading
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import joined, paths_read
from qwen_dist.config import ExportConfig, parse_bytes
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import start_jax

EXAMPLES = """\
example:
  qwen-dist export --model ~/qwen3-8b --output ~/qwen3-8b-float32 --dtype float32 --max-shard-size 2GB"""


def run(config: ExportConfig, flags: ProcessFlags) -> int:
    """Save the checkpoint, with the adapter merged, in the output directory."""
    model = config.model
    with joined("export", config, flags) as processes:
        if processes.is_main:
            written = [Written("--output", config.output, is_directory=True)]
            check_paths(paths_read(model.path, flags.config, model.adapter), written)
        start_jax(flags.num_cpu_devices, model.dtype or "")
        processes.check_devices()
        from qwen_dist.checkpoint.model import export_model
        from qwen_dist.mesh import MeshConfig, make_mesh
        from qwen_dist.sharding import INFERENCE, ShardingContext

        with loading("exporting", quiet=flags.json or not processes.is_main) as progress:
            export_model(
                model.path,
                ShardingContext(make_mesh(MeshConfig.parse(config.mesh)), INFERENCE),
                config.output,
                adapter=model.adapter,
                dtype=model.dtype,
                ignored_config_keys=model.ignored_keys,
                max_shard_bytes=parse_bytes(config.max_shard_size),
                overwrite=config.overwrite,
                host_memory_budget=model.host_memory_bytes,
                progress=progress,
            )
        print(json.dumps({"output": config.output}) if flags.json else f"saved: {config.output}")
    return 0


VERB = Verb("export", ExportConfig, ProcessFlags, run, EXAMPLES)
