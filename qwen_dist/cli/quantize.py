"""`qwen-dist quantize`: save a checkpoint with its weights in fewer bits."""

from __future__ import annotations

import json

from qwen_dist.cli.console import announcer, loading
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import joined, paths_read
from qwen_dist.config import QuantizeConfig, parse_bytes
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import start_jax

EXAMPLES = """\
examples:
  qwen-dist quantize --model ~/qwen3-8b --output ~/qwen3-8b-int4
  qwen-dist quantize --model ~/qwen3-8b --output ~/qwen3-8b-int4 --calibration text.txt
  qwen-dist quantize --model ~/qwen3-8b --output ~/qwen3-8b-int8 --quantize int8 --quantize-group-size 0
the output is in the formats of compressed-tensors, which transformers and vLLM load"""


def run(config: QuantizeConfig, flags: ProcessFlags) -> int:
    """Quantise the checkpoint and save it in the output directory."""
    model = config.model
    with joined("quantize", config, flags) as processes:
        if processes.is_main:
            check_paths(paths_read(model.path, flags.config), [Written("--output", config.output, is_directory=True)])
        start_jax(flags.num_cpu_devices, model.dtype)
        processes.check_devices()
        from qwen_dist.checkpoint.compressed import quantize_checkpoint
        from qwen_dist.mesh import MeshConfig, make_mesh
        from qwen_dist.quantization.options import QuantizeOptions
        from qwen_dist.sharding import INFERENCE, ShardingContext
        from qwen_dist.text_sample import read_tokens
        from qwen_dist.tokenizer import Tokenizer

        options = QuantizeOptions.of(model.quantize, model.quantize_group_size)
        assert isinstance(options, QuantizeOptions)
        tokens = []
        if config.calibration:
            encode = Tokenizer.open(model.path, model.ignored_keys).encode
            tokens = read_tokens("--calibration", config.calibration, encode, config.calibration_tokens)
        quiet = flags.json or not processes.is_main
        with loading("quantising", quiet=quiet) as progress:
            quantize_checkpoint(
                model.path,
                ShardingContext(make_mesh(MeshConfig.parse(config.mesh)), INFERENCE),
                config.output,
                options,
                dtype=model.dtype,
                calibration=tokens,
                ignored_config_keys=model.ignored_keys,
                max_shard_bytes=parse_bytes(config.max_shard_size),
                overwrite=config.overwrite,
                host_memory_budget=model.host_memory_bytes,
                progress=progress,
                announce=announcer(processes, quiet=quiet),
            )
        print(json.dumps({"output": config.output}) if flags.json else f"saved: {config.output}")
    return 0


VERB = Verb("quantize", QuantizeConfig, ProcessFlags, run, EXAMPLES)
