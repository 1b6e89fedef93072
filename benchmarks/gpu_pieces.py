"""What `gpu.py` measures, a function for each piece. Each yields rows: what, milliseconds, and the rates that follow.

Letters: B requests, T tokens, N query heads, K key/value heads, H head_dim, E experts, D embed, F mlp.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen_dist
from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.config import LoraOptions, ModelOptions, OptimizerOptions, SamplingOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.runner import Runner, SamplingTable, StepArrays
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.delta_net import GatedDeltaNet
from qwen_dist.models.parameters import abstract_parameters, disk_shapes, random_parameters, with_parameters
from qwen_dist.models.state import MixerInputs
from qwen_dist.models.state_spec import cache_groups
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops import grouped_matmul as grouped
from qwen_dist.ops.attention import ATTENTION, attention_in_blocks
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.paged_attention import PAGED_ATTENTION
from qwen_dist.ops.paged_cache import PAGE, PagedState
from qwen_dist.ops.step_rows import StepIndices, indices_in_order
from qwen_dist.runtime.backend import start_jax
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext, use_sharding
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.lora import new_adapter
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

Row = dict[str, Any]
DEMO = pathlib.Path(qwen_dist.DEMO_MODEL)
# Tokens that one program decodes before the host sees them, and those of each request before.
STEPS, CONTEXT = 16, 1024


def qwen3(layers: int, hidden: int, heads: int, mlp: int, *, tied: bool = False, **values: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    } | values


SHAPES = {
    "0.6b": qwen3(28, 1024, 16, 3072, tied=True),
    "1.7b": qwen3(28, 2048, 16, 6144, tied=True),
    "8b": qwen3(36, 4096, 32, 12_288),
}
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096}


def shape(name: str, dry_run: bool, **values: Any) -> ModelConfig:
    return parse_model_config(SHAPES[name] | (TINY if dry_run else {}) | values)


def one_device(rules: Any = INFERENCE) -> ShardingContext:
    return ShardingContext(make_mesh(MeshConfig(), jax.devices()[:1]), rules)


def random_model(config: ModelConfig, rules: Any = INFERENCE, dtype: str = "bfloat16") -> LoadedModel:
    module, sharding_ctx = Transformer(config, dtype=dtype), one_device(rules)
    return LoadedModel(config, module, random_parameters(module, sharding_ctx), sharding_ctx)


def clock(run: Callable[..., Any], *arguments: Any, seconds: float = 0.4) -> float:
    """Return the milliseconds of one call: of as many as take about `seconds`, waited for at the end only."""
    jax.block_until_ready(run(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    count = max(1, min(200, int(seconds / max(time.perf_counter() - begin, 1e-6))))
    begin = time.perf_counter()
    for _ in range(count):
        result = run(*arguments)
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - begin) / count


def row(what: str, ms: float, *, gigabytes: float = 0, teraflops: float = 0, tokens: float = 0, note: str = "") -> Row:
    """Return a row: the time of a call that moves and computes this much."""
    rates = {"gb_s": gigabytes, "tflop_s": teraflops, "tokens_s": tokens}
    found = {name: round(1e3 * value / ms, 3) for name, value in rates.items() if value}
    return {"what": what, "ms": round(ms, 4), **found, **({"note": note} if note else {})}


def failed(what: str, error: Exception) -> Row:
    return {"what": what, "note": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}


def random(key: int, *dims: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(key), dims, dtype))()


def forms(op: Op, dry_run: bool, *arguments: Any, **options: Any) -> dict[str, Callable[..., Any]]:
    """Return what may run on a GPU by name; in a dry run the kernels are interpreted."""
    found = {}
    for one in op.implementations(Backend.GPU):
        if dry_run and one.name != "plain":
            how: dict[str, Any] = {"implementation": "xla"} if one.name == "cudnn" else {"interpret": True}
            found[one.name] = functools.partial(one.run, **how)
        elif one.can_run(*arguments, **options):
            found[one.name] = one.run
    return found


@contextlib.contextmanager
def only(op: Op, name: str) -> Iterator[None]:
    """Let only one implementation of an operation run, where there are several."""
    before = dict(op._by_backend)
    kept: dict[Backend, tuple[Implementation, ...]] = {
        backend: tuple(one for one in implementations if one.name == name) for backend, implementations in before.items()
    }
    op._by_backend.update(kept)
    jax.clear_caches()
    try:
        yield
    finally:
        op._by_backend.update(before)


# --- the machine ---


def machine(dry_run: bool) -> Iterator[Row]:
    """Which devices, versions, kernels and settings; by the command line, as a user would ask."""
    done = subprocess.run([sys.executable, "-m", "qwen_dist", "doctor", "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    for name in ("versions", "devices", "features", "backends", "missing"):
        yield {"what": name, "note": json.dumps(report[name])}
    for one in report["settings"]:
        yield {"what": one["name"], "note": f"{one['value']} (set by {one['set by']})"}


def ceilings(dry_run: bool) -> Iterator[Row]:
    """What the device does at most: a copy, and a matrix product."""
    elements, size = (2**20, 256) if dry_run else (2**30, 8192)
    x = jnp.ones(elements, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    yield row("copy", clock(copy, x), gigabytes=2 * x.nbytes / 1e9)
    a, b = random(0, size, size), random(1, size, size)
    for name, out in (("matrix product", jnp.bfloat16), ("matrix product, rounded after it", jnp.float32)):
        multiply = jax.jit(lambda a, b, out=out: jnp.matmul(a, b.T, preferred_element_type=out).astype(jnp.bfloat16))
        yield row(name, clock(multiply, a, b), teraflops=2 * size**3 / 1e12)
    narrow = a[:8]
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b.T, preferred_element_type=jnp.float32))
    yield row("8 rows by a matrix", clock(multiply, narrow, b), gigabytes=b.nbytes / 1e9)


# --- is it right ---


def parity(dry_run: bool) -> Iterator[Row]:
    """A tiny model in float32 against the CPU, and every kernel against the plain form, on the device."""
    config = parse_model_config(SHAPES["0.6b"] | TINY | {"num_hidden_layers": 2})
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)).astype(np.int32)
    logits = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        sharding_ctx = ShardingContext(make_mesh(MeshConfig(), [device]), INFERENCE)
        module = Transformer(config, dtype="float32")
        with jax.default_device(jax.devices("cpu")[0]):
            on_host = {
                name: 0.05 * jax.random.normal(jax.random.key(number), leaf.shape)
                for number, (name, leaf) in enumerate(abstract_parameters(module, sharding_ctx).items())
            }

        def run(parameters: Any, tokens: jax.Array, module: Any = module, sharding_ctx: Any = sharding_ctx) -> jax.Array:
            with use_sharding(sharding_ctx):
                model = with_parameters(module, parameters)
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
                return model.unembed(model(tokens, positions)[0])

        parameters, here = jax.device_put((on_host, tokens), device)
        logits.append(np.asarray(jax.jit(run)(parameters, here)))
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()
    yield {"what": "logits in float32, greatest difference from the CPU's", "note": f"{error:.2e} of the greatest logit"}
    for name, found, expected in (*_attention_results(dry_run), *_paged_results(dry_run), *_grouped_results(dry_run)):
        try:
            x, y = (np.asarray(value(), np.float32) for value in (found, expected))
            yield {"what": name, "note": f"{np.abs(x - y).max() / np.abs(y).max():.2e} of the greatest number"}
        except Exception as error:
            yield failed(name, error)


def _attention_results(dry_run: bool) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    T = 64 if dry_run else 512
    for H in (64,) if dry_run else (64, 128, 256):
        q, k, v = random(0, 2, T, 4, H), random(1, 2, 2, T, H), random(2, 2, 2, T, H)
        positions = jnp.broadcast_to(jnp.arange(T), (2, T))
        for name, run in forms(ATTENTION, dry_run, q, k, v, positions).items():
            if name != "plain":
                for part in ("output", "gradient"):
                    found, expected = (
                        functools.partial(_attention_part, part, each, (q, k, v), positions)
                        for each in (run, attention_in_blocks)
                    )
                    yield f"attention, {name}, heads of {H}: {part}", found, expected


def _attention_part(part: str, run: Any, operands: Any, positions: jax.Array) -> jax.Array:
    if part == "output":
        return jax.jit(lambda *x: run(*x, positions))(*operands)
    loss = lambda *x: jnp.sum(run(*x, positions).astype(jnp.float32) ** 2)  # noqa: E731
    return jnp.concatenate([x.ravel().astype(jnp.float32) for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)])


def _paged_results(dry_run: bool) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    for T, H in ((1, 128),) if dry_run else ((1, 128), (32, 128), (1, 256)):
        given = _paged_arguments(2, T, 4, 2, H, 192)
        run = forms(PAGED_ATTENTION, dry_run, *given)
        if "triton" in run:
            yield (
                f"pages, triton, {T} queries, heads of {H}",
                functools.partial(jax.jit(functools.partial(run["triton"], sliding_window=None)), *given[:4]),
                functools.partial(run["plain"], *given),
            )


def _paged_arguments(B: int, T: int, N: int, K: int, H: int, context: int) -> tuple[Any, ...]:
    """Return queries at the end of B sequences, whose pages stand in order."""
    pages_per_row = -(-context // PAGE)
    positions = jnp.broadcast_to(jnp.arange(context - T, context), (B, T)).astype(jnp.int32)
    (pages,) = indices_in_order(1, positions, 1, pages_per_row).pages
    pool = 1, B * pages_per_row, K, PAGE, H
    state = PagedState(*(random(key, *pool).view(jnp.uint16) for key in (1, 2)))
    return random(0, B, T, N, H), state, positions, pages, None


def _grouped_results(dry_run: bool) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    E, R, O, C = 4, 96, 128, 192
    x, weights, sizes = random(0, R, C), random(1, E, O, C), jnp.asarray([50, 0, 45, 1], jnp.int32)
    options = {"dim": 2, "dtype": jnp.dtype(jnp.bfloat16)}
    run = forms(grouped.ROWS_BY_WEIGHTS, dry_run, x, weights, sizes, **options)
    if "triton" in run:
        found, expected = (jax.jit(functools.partial(run[name], **options)) for name in ("triton", "plain"))
        yield "experts, triton", *(functools.partial(each, x, weights, sizes) for each in (found, expected))
    y = random(2, R, O)
    run = forms(grouped.ROWS_BY_ROWS, dry_run, y, x, sizes)
    if "triton" in run:
        found, expected = (functools.partial(jax.jit(run[name]), y, x, sizes) for name in ("triton", "plain"))
        yield "experts' gradient, triton", found, expected


# --- decode ---


def decode(name: str, dry_run: bool) -> Iterator[Row]:
    """Decode through the engine's own program, at several batch sizes, with all layers."""
    sizes = (1, 2) if dry_run else (1, 32, 8, 64, 256)
    model = random_model(shape(name, dry_run))
    for B in sizes:
        try:
            yield _decode_row(f"decode {name}, B={B}", model, B, dry_run)
        except Exception as error:
            yield failed(f"decode {name}, B={B}", error)


def _decode_row(what: str, model: LoadedModel, B: int, dry_run: bool, note: str = "") -> Row:
    context, steps = (64, 4) if dry_run else (CONTEXT, STEPS)
    run, cache_bytes = decoder(model, B, context, steps)
    ms = clock(run) / steps
    head = model.parameters.get("lm_head.weight", model.parameters["embed_tokens.weight"])
    embedding = model.parameters["embed_tokens.weight"]
    read = sum(x.nbytes for x in model.parameters.values()) - (0 if head is embedding else embedding.nbytes)
    return row(what, ms, gigabytes=(read + cache_bytes) / 1e9, tokens=B, note=note)


def decoder(model: LoadedModel, B: int, context: int, steps: int) -> tuple[Callable[[], Any], int]:
    """Return a function that decodes `steps` tokens of each of B sequences, and the bytes of their cache."""
    runner = Runner(model, B, steps)
    pages_per_row = (context + steps) // PAGE + 1
    state = [runner.start((B * pages_per_row,))]
    positions = jnp.full((B, 1), context, jnp.int32)
    every = jnp.broadcast_to(jnp.arange(context + steps), (B, context + steps))
    indices = indices_in_order(len(cache_groups(runner.specs)), every, 1, pages_per_row)
    first = context // PAGE
    pages = tuple(
        one._replace(write_BN=one.write_BN[:, first : first + 2], first_page_B=jnp.full(B, first, jnp.int32))
        for one in indices.pages
    )
    step = StepArrays(None, positions, None, jnp.int32(steps), StepIndices(jnp.arange(B, dtype=jnp.int32), pages))
    sampling = SamplingTable(0).look_up(np.zeros(B, np.int32), ())._replace(end_B=np.full(B, 2**30, np.int32))

    def run() -> Any:
        state[0], sampled = runner._decode(model.parameters, state[0], step, sampling, num_top=None)
        return sampled

    caches = [x for one in runner.specs for x in one.page_arrays(PAGE)]
    of_page = sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in caches)
    return run, int(B * (context + steps / 2) / PAGE * of_page)


def decode_parts(dry_run: bool) -> Iterator[Row]:
    """What attention and the head take: four layers, with each form of attention, and with a vocabulary of 256."""
    layers = {} if dry_run else {"num_hidden_layers": 4}
    for name in ("8b", "0.6b"):
        for B in (1, 2) if dry_run else (1, 32, 256):
            for what, forced, values in (
                ("", None, {}),
                (", plain attention", "plain", {}),
                (", without the head", None, {"vocab_size": 256}),
            ):
                label = f"4 layers of {name}, B={B}{what}"
                try:
                    with only(PAGED_ATTENTION, forced) if forced else contextlib.nullcontext():
                        yield _decode_row(label, random_model(shape(name, dry_run, **layers, **values)), B, dry_run)
                except Exception as error:
                    yield failed(label, error)


# --- the engine ---


@contextlib.contextmanager
def engine_of(name: str, dry_run: bool, **options: Any) -> Iterator[Engine]:
    """Open an engine with random weights of a shape, and the demonstration model's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        values = SHAPES[name] | (TINY if dry_run else {})
        pathlib.Path(folder, "config.json").write_text(json.dumps(values | {"architectures": ["Qwen3ForCausalLM"]}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            pathlib.Path(folder, file).write_bytes((DEMO / file).read_bytes())
        given = ModelOptions(path=folder, dtype="bfloat16", load_format="dummy")
        cache_bytes = 10**8 if dry_run else 8 * 10**9
        engine, tokenizer, _ = open_engine(given, "data=1", SamplingOptions(), cache_bytes=cache_bytes, **options)
        tokenizer.stop_ids = frozenset()
        yield engine


def requests(lengths: list[int], num_tokens: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    params = SamplingParams(max_new_tokens=num_tokens, temperature=0.0)
    return [Request(key, tuple(rng.integers(10, 250, length).tolist()), params) for key, length in enumerate(lengths)]


def prefill(name: str, dry_run: bool) -> Iterator[Row]:
    """A prompt through the engine, to its first token."""
    config = shape(name, dry_run)
    flops_per_token = 2 * (_num_weights(config) - 2 * config.vocab_size * config.hidden_size)
    with engine_of(name, dry_run, max_batch_size=1, prefix_cache=False) as engine:
        for length in (64, 128) if dry_run else (1024, 8192):
            list(engine.run(requests([length], 1)))
            begin = time.perf_counter()
            list(engine.run(requests([length], 1, seed=1)))
            ms = 1e3 * (time.perf_counter() - begin)
            heads = 2 * length * config.num_attention_heads * config.head_dim * len(config.layers)  # causal
            yield row(f"prefill {name}, {length}", ms, teraflops=length * (flops_per_token + heads) / 1e12, tokens=length)


def _num_weights(config: ModelConfig) -> int:
    module = Transformer(config, dtype="bfloat16")
    leaves = abstract_parameters(module, one_device()).items()
    tied = config.vocab_size * config.hidden_size * config.tie_word_embeddings
    return sum(int(np.prod(leaf.shape)) for _, leaf in leaves) + tied


def file(dry_run: bool) -> Iterator[Row]:
    """500 requests of mixed length through the engine, 64 tokens each."""
    count, slots, most = (6, 4, 40) if dry_run else (500, 128, 512)
    lengths = np.random.default_rng(0).integers(16, most, count).tolist()
    with engine_of("0.6b", dry_run, max_batch_size=slots, steps_per_dispatch=4 if dry_run else 16) as engine:
        engine.warm_up()
        begin = time.perf_counter()
        num_tokens = sum(len(update.tokens) for update in engine.run(requests(lengths, 8 if dry_run else 64, seed=1)))
        ms = 1e3 * (time.perf_counter() - begin)
        yield row(f"{count} requests of 0.6b, {slots} at a time", ms, tokens=num_tokens, note=f"{sum(lengths)} tokens read")


# --- operations ---


def attention(dry_run: bool) -> Iterator[Row]:
    """Attention without a cache, forward and both passes, in each form: rows of one sequence, causal."""
    lengths = (64,) if dry_run else (1024, 8192)
    for N, K, H in ((2, 1, 64),) if dry_run else ((32, 8, 128), (16, 2, 256)):
        for T in lengths:
            operands = random(0, 1, T, N, H), random(1, 1, K, T, H), random(2, 1, K, T, H)
            positions = jnp.arange(T, dtype=jnp.int32)[None]
            flops = 2 * T * T * N * H / 1e12  # half of each product
            for name, run in forms(ATTENTION, dry_run, *operands, positions).items():
                what = f"attention {T}, {N}/{K} heads of {H}, {name}"
                try:
                    forward, both = _passes(run, positions)
                    yield row(what, clock(forward, *operands), teraflops=flops)
                    yield row(f"{what}, both passes", clock(both, *operands), teraflops=3.5 * flops)
                except Exception as error:
                    yield failed(what, error)


def _passes(run: Callable[..., Any], positions: jax.Array) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(run(*operands, positions).astype(jnp.float32))

    return jax.jit(lambda *operands: run(*operands, positions)), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def experts(dry_run: bool) -> Iterator[Row]:
    """The three products of the experts of Qwen3-30B-A3B, by the number of tokens, in each form."""
    E, K, D, F = (4, 2, 64, 32) if dry_run else (128, 8, 2048, 768)
    gate_up, down = random(0, E, 2 * F, D), random(1, E, D, F)
    options = {"dim": 2, "dtype": jnp.dtype(jnp.bfloat16)}
    for T in (4,) if dry_run else (1, 32, 512, 8192):
        R = T * K
        x, hidden = random(2, R, D), random(3, R, F)
        sizes = jnp.asarray(np.bincount(np.random.default_rng(0).integers(0, E, R), minlength=E), jnp.int32)
        used = int((np.asarray(sizes) > 0).sum()) / E
        for name, run in forms(grouped.ROWS_BY_WEIGHTS, dry_run, x, gate_up, sizes, **options).items():
            what = f"experts of {T} tokens, {name}"
            try:
                product = jax.jit(functools.partial(run, **options))
                ms = clock(product, x, gate_up, sizes) + clock(product, hidden, down, sizes)
                flops, size = 6 * R * D * F / 1e12, used * (gate_up.nbytes + down.nbytes) / 1e9
                yield row(what, ms, teraflops=flops, gigabytes=size)
            except Exception as error:
                yield failed(what, error)


def delta_net(dry_run: bool) -> Iterator[Row]:
    """A gated delta net of Qwen3.5-27B's shape: prompts without a cache, and one step of several requests."""
    sizes = {"linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128}
    sizes |= {"linear_value_head_dim": 128, "hidden_size": 5120, "head_dim": 256, "num_attention_heads": 24}
    tiny = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    values = SHAPES["8b"] | sizes | (TINY | tiny if dry_run else {"num_key_value_heads": 4})
    values |= {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "full_attention_interval": 4, "vocab_size": 512}
    values |= {"linear_conv_kernel_dim": 4}
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta"), "partial_rotary_factor": 0.25}
    values |= {"rope_parameters": rope}
    config = parse_model_config(values)
    module, sharding_ctx = GatedDeltaNet(config, config.layers[0], dtype=jnp.bfloat16), one_device()
    parameters = random_parameters(module, sharding_ctx)

    def forward(parameters: Any, x_BTD: jax.Array) -> jax.Array:
        with use_sharding(sharding_ctx):
            B, T, _ = x_BTD.shape
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
            inputs = MixerInputs((x_BTD, x_BTD), positions)
            return with_parameters(module, parameters)(x_BTD, inputs, None)[0]

    run = jax.jit(forward)
    weights = sum(x.size for x in parameters.values())
    for B, T in ((1, 64), (2, 1)) if dry_run else ((1, 1024), (1, 4096), (64, 1)):
        x = random(0, B, T, config.hidden_size)
        what = f"delta net, {B} × {T} tokens"
        yield row(what, clock(run, parameters, x), teraflops=2 * B * T * weights / 1e12, tokens=B * T)


# --- training ---


def train(dry_run: bool) -> Iterator[Row]:
    """One LoRA step and one full step of 1.7B, as `finetune` does them: packed rows, recomputed blocks."""
    rows, length = (2, 64) if dry_run else (4, 2048)
    for method, packed in (("lora", True), ("lora", False), ("full", False)):
        what = f"{method} step of 1.7b, {rows} × {length}{', packed' if packed else ''}"
        try:
            yield _train_row(what, method, rows, length, packed, dry_run)
        except Exception as error:
            yield failed(what, error)


def _train_row(what: str, method: str, rows: int, length: int, packed: bool, dry_run: bool) -> Row:
    model = random_model(shape("1.7b", dry_run), TRAIN, "bfloat16" if method == "lora" else "float32")
    names = list(model.parameters)
    if method == "lora":
        model, names = new_adapter(model, LoraOptions(), dtype=jnp.float32)
    options = OptimizerOptions(learning_rate=1e-5)
    schedule = make_schedule(options, 100)
    shapes = {name: model.parameters[name].shape for name in names}
    optimizer = make_optimizer(options, schedule, shapes, disk_shapes(model.module))
    trainer = Trainer(model, names, optimizer, schedule, dtype="bfloat16", remat="full")
    state = trainer.init_state()
    tokens = np.random.default_rng(0).integers(0, 4000, (rows, length)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    half = length // 2
    segments = 1 + (positions >= half).astype(np.int32) if packed else None
    batch = TrainBatch(tokens, tokens, ones, positions % half if packed else positions, segments)
    state, _ = trainer.step(state, [batch])
    times = []
    for _ in range(1 if dry_run else 3):
        begin = time.perf_counter()
        state, result = trainer.step(state, [batch])
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - begin))
    weights = _num_weights(model.config) - model.config.vocab_size * model.config.hidden_size
    # Forward, forward again, and by activations; by weights where these are trained.
    passes = 4 if method == "full" else 3
    return row(what, min(times), teraflops=2 * passes * weights * tokens.size / 1e12, tokens=tokens.size)


PIECES: dict[str, Callable[[bool], Iterator[Row]]] = {
    "machine": machine,
    "ceilings": ceilings,
    "parity": parity,
    "decode-8b": functools.partial(decode, "8b"),
    "decode-0.6b": functools.partial(decode, "0.6b"),
    "decode-parts": decode_parts,
    "attention": attention,
    "train": train,
    "prefill-8b": functools.partial(prefill, "8b"),
    "prefill-0.6b": functools.partial(prefill, "0.6b"),
    "file": file,
    "experts": experts,
    "delta-net": delta_net,
}


def started(piece: str, run: Callable[[bool], Iterator[Row]]) -> Callable[[bool], Iterator[Row]]:
    """Start jax before a piece as the command line does: in float32 where numbers are compared."""

    def start(dry_run: bool) -> Iterator[Row]:
        if piece != "machine":
            start_jax(None, "float32" if piece == "parity" else "bfloat16")
        yield from run(dry_run)

    return start


PIECES = {piece: started(piece, run) for piece, run in PIECES.items()}
