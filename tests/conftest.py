"""Eight CPU devices for every test, set before jax starts."""

import ctypes
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test workers that compile for TPUs at the same time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Test workers, the processes that tests start, and the next run share compiled programs; `pytest --cache-clear` drops them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/d/compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most programs of the tests run once, so they are compiled with less optimisation, which takes less time.
# `XLA_FLAGS= pytest` compiles them as users' are; .ci/run does so for some rooms, the nightly run for all.
# jax 0.12 does not know the second flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jax").startswith("0.10.")
    else "--xla_backend_optimization_level=0",
)
# Few arenas of malloc: memory that one thread frees serves the others.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

import jax
import pytest
from native_kernels import cpu_build  # noqa: F401  # a fixture

jax.config.update("jax_num_cpu_devices", 8)
# A shell that starts the tests in the background has them ignore Ctrl-C, and the programs they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_CHECKPOINT = pathlib.Path.home() / ".cache/qwen_dist/qwen2.5-coder-0.5b-instruct"

# Sizes that hide nothing: heads × head_dim is not hidden_size, several key/value heads, a vocabulary that is not even.
TINY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 40, "head_dim": 16},
    # The second layer of three is dense; in the other family it is the only one with experts.
    "qwen2_moe": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "norm_topk_prob": False}
    | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    | {"mlp_only_layers": [1]},
    "qwen3_moe": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 40, "head_dim": 16}
    | {"num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    | {"decoder_sparse_step": 2},
}
# Value heads 1, 2 and 3 times the key heads; every second layer has attention.
_HYBRID = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 40, "head_dim": 16, "linear_num_key_heads": 2}
_HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "full_attention_interval": 2}
_HYBRID_MOE = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
_HYBRID_MOE |= {"shared_expert_intermediate_size": 24}
TINY_SIZES |= {
    "qwen3_next": _HYBRID | _HYBRID_MOE | {"linear_num_value_heads": 6, "mlp_only_layers": [1]},
    "qwen3_5": _HYBRID | {"linear_num_value_heads": 4},
    "qwen3_5_moe": _HYBRID | _HYBRID_MOE | {"linear_num_value_heads": 2},
}
# The text model of a family whose `model_type` is that of a multimodal model.
TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


# Where the tests are that take longest. They run first: a worker that begins one at the end leaves the others without work.
LONGEST = tuple(
    f"tests/{name}"
    for name in ("real", "server", "train", "test_cli", "test_outputs", "test_examples", "batch", "distributed", "engine")
)


TOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = ["the quick brown fox jumps over the lazy dog", "def is_prime(n):\n    return n > 1", "日本語 und Größe 😀"]
CHAT_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(turns=0) %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unexpected role ' ~ message.role) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function | tojson(indent=1)) + '</tool_call>' }}
        {%- endfor %}
        {% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n' ~ ns.turns }}
    {%- endif %}
{%- endif %}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-part", metavar="I/N", help="of the slow tests only part I of N, chosen by their names' hash")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files first that take longest, and leave out the slow tests of other parts."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    if not (given := config.getoption("--slow-part")):
        return
    index, number = map(int, given.split("/"))

    def is_kept(item: pytest.Item) -> bool:
        return "slow" not in item.keywords or zlib.crc32(item.nodeid.encode()) % number == index % number

    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = [item for item in items if is_kept(item)]


def pytest_collection_finish() -> None:
    """Keep what has been imported out of garbage collections, each of which would look through a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _free_programs():
    """Drop the compiled programs of a module after it: otherwise those of the whole run stay in memory."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def real_checkpoint() -> pathlib.Path:
    """The directory of Qwen2.5-Coder-0.5B-Instruct, when it has been built (CONTRIBUTING.md says how)."""
    if not (REAL_CHECKPOINT / "config.json").exists():
        pytest.skip(f"the real checkpoint is not at {REAL_CHECKPOINT}")
    return REAL_CHECKPOINT


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """A function (family, **config values) -> directory of a random checkpoint that transformers itself wrote."""
    made: dict[str, pathlib.Path] = {}

    def make(family: str, **values: Any) -> pathlib.Path:
        import torch
        import transformers

        key = f"{family} {sorted(values.items())}"
        if key not in made:
            torch.manual_seed(0)
            sizes = {"vocab_size": 311, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 2048}
            config = transformers.AutoConfig.for_model(
                TEXT_TYPES.get(family, family), **(sizes | {"initializer_range": 0.2} | TINY_SIZES[family] | values)
            )
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros, which hide faults
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a byte-level BPE of Qwen's form, trained here to an unusual size and with odd added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=331, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "é", "日é")])
    directory = tmp_path_factory.mktemp("small")
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    end, im_end = backend.token_to_id("<|endoftext|>"), backend.token_to_id("<|im_end|>")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": end}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, end]}))
    return directory


@pytest.fixture(scope="session")
def tiny_directory(
    tiny_checkpoint: Callable[..., pathlib.Path],
    small_tokenizer: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., pathlib.Path]:
    """A function (family, generation settings, **config values) -> new directory of a whole checkpoint.

    It has the weights of `tiny_checkpoint` and the tokenizer of `small_tokenizer`, with every file its own to change.
    """

    def make(family: str, generation: Mapping[str, Any] | None = None, **values: Any) -> pathlib.Path:
        directory = tmp_path_factory.mktemp("whole")
        # 344 holds the tokenizer's ids, and 8 devices divide it.
        for source in (small_tokenizer, tiny_checkpoint(family, **({"vocab_size": 344} | values))):
            shutil.copytree(source, directory, dirs_exist_ok=True)
        ends = json.loads((small_tokenizer / "generation_config.json").read_text())
        (directory / "generation_config.json").write_text(json.dumps(ends | dict(generation or {})))
        return directory

    return make


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of 40 short conversations."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    turns = [(f"the quick {'fox ' * (n % 5)}", f"brown dog {'lazy ' * (n % 7)}") for n in range(40)]
    messages = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in messages))
    return path
