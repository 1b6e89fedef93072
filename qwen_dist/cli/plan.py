"""`qwen-dist plan`: estimate memory and speed of a model on any devices."""

from __future__ import annotations

from qwen_dist.cli.console import make_console
from qwen_dist.cli.flags import Flags, Verb
from qwen_dist.cli.session import paths_read
from qwen_dist.config import PlanConfig
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import find_devices, start_jax

EXAMPLES = """\
examples:
  qwen-dist plan --model ~/qwen3-32b --topology v5e:8x8 --command batch --batch-size 64 --context 4096
  qwen-dist plan --model config.json --topology v6e:4x4 --mesh fsdp=16 --command finetune --method full --compile 3,5
  qwen-dist plan --model ~/qwen3-0.6b --topology cpu:8 --mesh data=2,tensor=4 --compile
reads config.json only; --compile for a TPU needs libtpu (pip install 'jax[tpu]') but no TPU
exit code 1 if it does not fit"""


def run(config: PlanConfig, flags: Flags) -> int:
    """Print the plan, and write its page."""
    from qwen_dist.hf_config import read_model_config
    from qwen_dist.planning.chips import Topology

    topology = Topology.parse(config.topology)
    read = paths_read(config.model.path, flags.config)
    check_paths(read, [Written("--chart", config.chart, is_page=True)])
    start_jax(topology.num_devices if topology.is_cpu else 1, config.model.dtype, use_compilation_cache=topology.is_cpu)
    find_devices()
    from qwen_dist.checkpoint.quantized import Quantization
    from qwen_dist.planning.plan import compile_plan, make_capacity_plan, parse_layers
    from qwen_dist.planning.report import print_plan, to_json, write_chart
    from qwen_dist.planning.workload import Workload
    from qwen_dist.quantization.options import CACHE_DTYPES, QuantizeOptions
    from qwen_dist.storage.model_files import ModelFiles

    files = ModelFiles.open(config.model.path)
    model = read_model_config(files, config.model.ignored_keys)
    lora = config.lora if config.command == "finetune" and config.method == "lora" else None
    quantize = QuantizeOptions.of_model(config.model)
    # Training of all parameters dequantises them.
    quantization = Quantization.of(files.config, quantize) if config.command == "batch" or lora is not None else None
    if quantization is not None:
        quantization.check(model, config.model.dtype)
    workload = Workload(
        config.command,
        config.batch_size,
        config.context,
        config.model.dtype,
        config.remat,
        lora,
        quantization,
        CACHE_DTYPES[config.model.kv_cache_dtype],
    )
    plan = make_capacity_plan(config.model.path, model, topology, workload, config.mesh or None)
    if config.compile is not None:
        plan = compile_plan(plan, model, parse_layers(config.compile, model.layers))
    if flags.json:
        print(to_json(plan))
    else:
        print_plan(plan, make_console())
    if config.chart:
        write_chart(plan, config.chart)
    return 0 if plan.chosen.fits else 1


VERB = Verb(
    "plan",
    PlanConfig,
    Flags,
    run,
    EXAMPLES,
    usage="qwen-dist plan --model DIR_OR_HUB_ID --topology KIND:SIZES [flags]",
)
