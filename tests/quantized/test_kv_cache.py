"""Keys and values in 8 bits: the numbers, attention over them, the engine on meshes, and the memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_dist import LLM, SamplingParams
from qwen_dist.cli.main import main
from qwen_dist.config import UsageError
from qwen_dist.models.state_spec import AttentionSpec
from qwen_dist.ops import paged_cache
from qwen_dist.ops.attention import attention
from qwen_dist.ops.paged_attention import paged_attention_in_groups
from qwen_dist.ops.paged_cache import PAGE, PagedState, PageIndices

STORED = {"int8": jnp.int8, "float8_e4m3fn": jnp.uint8}
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def empty(cache_dtype, num_pages, heads, width):
    shape = (1, num_pages, heads, PAGE)
    values = [jnp.zeros((*shape, width), STORED[cache_dtype])] * 2
    return PagedState(*values, *[jnp.zeros((*shape, paged_cache.scales_for(width)), jnp.uint16)] * 2)


def dequantized(x, stored):
    """The values that a cache of this type gives back for keys or values, and their scales."""
    values, scale = paged_cache.quantize(x, stored)
    values = np.asarray(values).view(np.int8 if stored == jnp.int8 else ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.asarray(scale).view(ml_dtypes.bfloat16).astype(np.float32)
    scale = np.repeat(scale, x.shape[-1] // scale.shape[-1], axis=-1)
    return values * scale, scale


@pytest.mark.parametrize("cache_dtype", STORED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_value_is_the_nearest_of_its_scale(cache_dtype, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 48)) * rng.uniform(1e-3, 50, (2, 3, 4, 1))
    x[0, 0, 0], x[0, 0, 1] = 0, 1e-39
    x = jnp.asarray(x, dtype)
    found, scale = dequantized(x, STORED[cache_dtype])
    if cache_dtype == "int8":
        allowed = np.arange(-127, 128, dtype=np.float32)
    else:
        allowed = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        allowed = allowed[np.isfinite(allowed)]
    wide = np.asarray(x, np.float32)
    nearest = np.abs(wide[..., None] - allowed * scale[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(wide - found), nearest, rtol=1e-4, atol=1e-6 * np.abs(wide).max())
    largest = np.abs(wide).reshape(2, 3, 4, 3, 16).max(axis=-1)
    expected = np.where(largest < 1e-38, 1, largest / allowed.max())
    np.testing.assert_allclose(scale[..., ::16], expected, rtol=2**-8)


@pytest.mark.parametrize("cache_dtype", STORED)
@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_that_to_the_dequantised_keys(cache_dtype, window):
    """What is read is what was written, rounded to the cache's numbers, at any order of pages."""
    rng = np.random.default_rng(1)
    num_pages, length, heads, width = 3, 150, 2, 16
    q, k, v = (jnp.asarray(rng.standard_normal((1, length, n, width)), jnp.float32) for n in (4, heads, heads))
    positions, order = jnp.arange(length)[None], np.array([2, 0, 1], np.int32)
    page_BT = jnp.asarray(order[np.arange(length) // PAGE])[None]
    state = paged_cache.write(empty(cache_dtype, num_pages, heads, width), k, v, positions, page_BT)
    fill = paged_cache.MAX_ENTRIES - num_pages
    entries = (np.pad(x, (0, fill), constant_values=y)[None] for x, y in (
        (np.zeros(num_pages, np.int32), 0), (order, 0), (np.arange(num_pages, dtype=np.int32) * PAGE, paged_cache.NOWHERE),
    ))  # fmt: skip
    pages = PageIndices(order[None], np.zeros(1, np.int32), *entries, np.int32(num_pages))
    mixed = paged_attention_in_groups(q, state, positions, pages, window)
    read = (jnp.asarray(dequantized(x, STORED[cache_dtype])[0]) for x in (k, v))
    expected = attention(q, *(x.swapaxes(1, 2) for x in read), positions, window, None)
    np.testing.assert_allclose(mixed, expected, atol=2e-6)


SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in (("qwen3", "fp8"), ("qwen3_5", "int8"), ("qwen3_5", "fp8"))]


@pytest.mark.parametrize(("family", "form"), [("qwen3", "int8"), *SLOW])
def test_answers_are_the_same_on_every_mesh_and_alone(tiny_directory, family, form):
    path, prompts = tiny_directory(family), [list(range(5, 5 + n)) for n in (3, 70, 150)]
    arguments = {"dtype": "float32", "kv_cache_dtype": form, "max_batch_size": 4}
    one = LLM(path, mesh="data=1", devices=jax.devices()[:1], **arguments)
    together = [answer.token_ids for answer in one.generate(prompts, GREEDY)]
    assert [one.generate([prompt], GREEDY)[0].token_ids for prompt in prompts] == together
    sharded = LLM(path, mesh="data=2,tensor=2", devices=jax.devices()[:4], **arguments)
    assert [answer.token_ids for answer in sharded.generate(prompts, GREEDY)] == together


def test_a_small_cache_preempts_and_changes_nothing(tiny_directory):
    path, prompts = tiny_directory("qwen3"), [list(range(5, 5 + n)) for n in (130, 140, 150, 160)]
    arguments = {"dtype": "float32", "kv_cache_dtype": "int8", "devices": jax.devices()[:1], "prefix_cache": False}
    params = dataclasses.replace(GREEDY, max_new_tokens=100)
    large, small = LLM(path, **arguments), LLM(path, kv_cache_memory="160kB", **arguments)
    expected = [answer.token_ids for answer in large.generate(prompts, params)]
    assert [answer.token_ids for answer in small.generate(prompts, params)] == expected
    assert small._engine.stats.num_preempted > 0 and large._engine.stats.num_preempted == 0


def test_a_page_takes_its_bits():
    def num_bytes(form):
        arrays = AttentionSpec(8, 128, "bfloat16", None, form, 128 // 16).page_arrays(PAGE)
        return sum(np.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)

    assert num_bytes("int8") / num_bytes(None) == (128 + 2 * 8) / 256


def test_commands_take_it(tiny_directory, tmp_path, capsys):
    path = str(tiny_directory("qwen3"))
    flags = ["--model", path, "--kv-cache-dtype", "int8"]
    assert main(["generate", *flags, "--prompt", "the", "--raw", "--max-new-tokens", "3"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 8)
    capsys.readouterr()
    assert main(["parity", *flags, "--dtype", "float32", "--kl", str(text), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["mean"] < 1e-3 and report["num_tokens"] > 50
    memory = {}
    for form in ("auto", "int8"):
        plan = ["plan", "--model", path, "--topology", "cpu:8", "--kv-cache-dtype", form, "--json"]
        assert main(plan) == 0
        memory[form] = json.loads(capsys.readouterr().out)
    assert _cache_bytes(memory["int8"]) == pytest.approx(_cache_bytes(memory["auto"]) * (16 + 2) / 32, rel=0.1)


def _cache_bytes(plan):
    return plan["chosen"]["phases"][1]["memory"]["cache"]


def test_parity_needs_a_text_for_it():
    from qwen_dist.config import ParityConfig, ParityModelOptions

    with pytest.raises(UsageError, match="--kv-cache-dtype"):
        ParityConfig(ParityModelOptions("x", kv_cache_dtype="int8"))
