"""Every file format, flag and wire with damaged input: a result or one line, in bounded time and memory.

    pytest -m fuzz tests/fuzz

The cases are always the same. The summary counts how they ended; of the wrong ends one for each place is printed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pathlib
import shutil
import socket
import threading

import numpy as np
import pytest
from bounds import check_cases
from damage import HOSTILE, SPOILED, damaged_bytes, damaged_json, dumps
from hypothesis import strategies as st

from qwen_dist.batch.jsonl import read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.safetensors import build_header
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.cli import main
from qwen_dist.config import BatchConfig, FinetuneConfig, load_config
from qwen_dist.engine.generation_config import read_generation_config
from qwen_dist.errors import UserError
from qwen_dist.hf_config import read_model_config
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.control import GREETING, rendezvous
from qwen_dist.runtime.preflight import collect_host_info
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.metrics import MetricsLog
from qwen_dist.train.records import read_train_records

pytestmark = pytest.mark.fuzz

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 344,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step")
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "eos_token_id": [2, 0],
    "max_new_tokens": 64,
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PLAIN_LINE = {"id": "a", "messages": CHAT[:1], "temperature": 0.5, "top_k": 3, "seed": 7, "stop": ["END"], "max_tokens": 8}
OPENAI_LINE = {
    "custom_id": "b",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": CHAT[:1], "max_completion_tokens": 8, "top_p": 0.9, "logprobs": True, "n": 1},
}
TEMPLATE_PIECES = [
    *("{% for message in messages %}", "{% endfor %}", "{% if tools %}", "{% endif %}", "{{ message.content }}", "text"),
    *(
        "{{ messages[0]['role'] }}",
        "{% set ns = namespace(n=0) %}",
        "{% set ns.n = ns.n + 1 %}",
        "{{ ns.n }}",
        "{{ x",
        "%}",
    ),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{% generation %}", "{% endgeneration %}", "{{ 1 / 0 }}"),
    *("{{ messages | tojson }}", "{{ ''.__class__.__mro__ }}", "{{ range(10 ** 9) | list }}", "{{ 'A' * 4000000000 }}"),
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ '%4000000000s' % 'x' }}",
        "{{ 10 ** 10000000 }}",
        "{{ lipsum(9999) }}",
    ),
    *("{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}", "{% include 'x' %}", "{{ 'x' | center(10 ** 9) }}"),
]


@pytest.fixture(scope="module")
def whole(small_tokenizer, tmp_path_factory):
    """A directory of a whole checkpoint with one tensor."""
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(small_tokenizer, directory)
    (directory / "config.json").write_bytes(dumps(CONFIG))
    (directory / "generation_config.json").write_bytes(dumps(GENERATION))
    (directory / "model.safetensors").write_bytes(tensor_file(TENSORS))
    return directory


TENSORS = {"model.norm.weight": ("F32", (40,)), "model.embed_tokens.weight": ("BF16", (344, 40))}


def tensor_file(tensors):
    header = build_header(tensors, {"format": "pt"})
    sizes = [int(np.prod(shape)) * {"F32": 4, "BF16": 2}[dtype] for dtype, shape in tensors.values()]
    return header + bytes(sum(sizes))


def with_file(directory, name, use):
    """Return a function that writes a file of the directory and then uses the directory."""

    def run(content):
        (directory / name).write_bytes(content)
        return use(directory)

    return run


@pytest.fixture
def copied(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "model"))


def test_config(copied):
    known = [spoil(dumps(CONFIG)) for spoil in SPOILED.values()]
    run = with_file(copied, "config.json", read_model_config)
    check_cases("config.json", run, damaged_json(CONFIG, MOE_KEYS), known=known, max_examples=250)


def test_generation_config(copied):
    def use(directory):
        read_generation_config(directory)
        Tokenizer.open(directory)

    known = [spoil(dumps(GENERATION)) for spoil in SPOILED.values()]
    known += [dumps(GENERATION | {key: value}) for key in GENERATION for value in ("hot", "5", {}, 10**400, 2.5, True, -1)]
    run = with_file(copied, "generation_config.json", use)
    check_cases("generation_config.json", run, damaged_json(GENERATION), known=known)


def test_tokenizer_config(copied):
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "generation_config.json").unlink()

    def use(directory):
        Tokenizer.open(directory).apply_chat_template(CHAT)

    known = [spoil(dumps(settings)) for spoil in SPOILED.values()] + [dumps(settings | {"chat_template": 5})]
    run = with_file(copied, "tokenizer_config.json", use)
    check_cases("tokenizer_config.json", run, damaged_json(settings, ("bos_token", "unk_token")), known=known)


def test_tokenizer_file(copied):
    content = (copied / "tokenizer.json").read_bytes()

    def use(directory):
        tokenizer = Tokenizer.open(directory)
        tokenizer.decode(tokenizer.encode("Hi <|im_end|>"))

    known = [spoil(content) for spoil in SPOILED.values()]
    model = json.loads(content)
    parts = {**model, "model": {**model["model"], "vocab": {}, "merges": []}}
    run = with_file(copied, "tokenizer.json", use)
    check_cases("tokenizer.json", run, damaged_json(parts) | damaged_bytes(content), known=known, max_examples=100)


def test_chat_templates(copied):
    def use(directory):
        Tokenizer.open(directory).render_chat(CHAT)

    known = [piece.encode() for piece in TEMPLATE_PIECES] + [b"(" * 5000, b"{{" + b"(" * 5000, b"{% if x %}" * 300]
    known += [b"{% for x in [1] %}" * 21 + b"{% endfor %}" * 21, b"{{ raise_exception('x' * 5000000) }}", b"\xff", b""]
    pieces = st.lists(st.sampled_from([*TEMPLATE_PIECES[:17], *TEMPLATE_PIECES[:17]]) | st.text(max_size=5), max_size=8)
    run = with_file(copied, "chat_template.jinja", use)
    check_cases(
        "chat templates",
        run,
        pieces.map(lambda all: "".join(all).encode("utf-8", "replace")),
        known=known,
        max_examples=120,
    )


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(dumps(ADAPTER))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{prefix}.lora_A.weight": ("F32", (4, 40)), f"{prefix}.lora_B.weight": ("F32", (96, 4))}
    (directory / "adapter_model.safetensors").write_bytes(tensor_file(shapes))
    return directory


def test_adapter_config(adapter):
    known = [spoil(dumps(ADAPTER)) for spoil in SPOILED.values()]
    infinite, large = float("inf"), 10**400
    known += [dumps(ADAPTER | {"r": value}) for value in (infinite, 4.9, True, 0, -4, "4", large)]
    known += [dumps(ADAPTER | {"lora_alpha": value}) for value in (infinite, float("nan"), large, "8", None)]
    known += [dumps(ADAPTER | {"target_parameters": 5}), dumps(ADAPTER | {"use_rslora": "false"})]
    run = with_file(adapter, "adapter_config.json", read_adapter)
    check_cases("adapter_config.json", run, damaged_json(ADAPTER, ("lora_bias", "layer_replication")), known=known)


def headers(content):
    """Return safetensors files with damaged headers, and files with damaged bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def whole_file(text):
        return len(text).to_bytes(8, "little") + text + data

    known = [whole_file(spoil(dumps(header))) for spoil in SPOILED.values()]
    cases = damaged_json(header).map(whole_file) | damaged_bytes(content)
    return cases, known


def test_adapter_weights(adapter):
    cases, known = headers((adapter / "adapter_model.safetensors").read_bytes())
    check_cases(
        "adapter_model.safetensors", with_file(adapter, "adapter_model.safetensors", read_adapter), cases, known=known
    )


def test_safetensors(copied):
    cases, known = headers((copied / "model.safetensors").read_bytes())
    known.append(tensor_file({}) + dumps({f"t{number}": 0 for number in range(300_000)} | {"t1": 0}))
    run = with_file(copied, "model.safetensors", open_checkpoint)
    check_cases("model.safetensors", run, cases, known=known, max_examples=250)


def test_index(copied):
    index = {"metadata": {"total_size": 27680}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    names = [
        "../x.safetensors",
        "/x.safetensors",
        "a" * 300 + ".safetensors",
        "\ud800.safetensors",
        "\0.safetensors",
        5,
        None,
    ]
    known = [spoil(dumps(index)) for spoil in SPOILED.values()]
    known += [dumps({"weight_map": dict.fromkeys(TENSORS, name)}) for name in names]
    known.append(dumps({"weight_map": {f"t{number}": f"{number}.safetensors" for number in range(20_000)}}))
    run = with_file(copied, "model.safetensors.index.json", open_checkpoint)
    check_cases("index", run, damaged_json(index), known=known)


def lines_of(valid):
    """Return files of lines: a good one, a damaged one and a good one."""
    good = dumps(valid[0] | {"id": "good"}) if "id" in valid[0] else dumps(valid[0])
    return st.one_of(*(damaged_json(line) for line in valid)).map(lambda line: good + b"\n" + line + b"\n" + good + b"\n")


def test_batch_lines(tmp_path):
    path = tmp_path / "in.jsonl"

    def run(content):
        path.write_bytes(content)
        records = list(read_records(path))
        numbers = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        assert [record.line_number for record in records] == numbers, "not every line has a record"

    known = [spoil(dumps(line)) for line in (PLAIN_LINE, OPENAI_LINE) for spoil in SPOILED.values()]
    check_cases("batch lines", run, lines_of([PLAIN_LINE, OPENAI_LINE]), known=known, max_examples=300)


def test_training_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    valid = [{"messages": CHAT, "tools": [{"type": "function"}]}, {"prompt": "Hi", "completion": "Hello"}, {"text": "Once"}]

    def run(content):
        path.write_bytes(content)
        return list(read_train_records([str(path)], raw=False))

    known = [spoil(dumps(line)) for line in valid for spoil in SPOILED.values()]
    check_cases("training lines", run, lines_of(valid), known=known, max_examples=250)


def packed(suffix, lines):
    """Return a file of lines in a format by its suffix."""
    if suffix == ".gz":
        return gzip.compress(b"".join(lines), mtime=0)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        return zstandard.ZstdCompressor().compress(b"".join(lines))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), file)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_packed_files(suffix, tmp_path):
    lines = [dumps({"id": str(number), "prompt": "Hi " * number}) + b"\n" for number in range(50)]
    content, path, data = packed(suffix, lines), tmp_path / f"in.jsonl{suffix}", tmp_path / "data.parquet"

    def run(content):
        path.write_bytes(content)
        records = list(read_records(path))
        assert suffix == ".parquet" or len(records) >= len(lines), f"{len(records)} records and no error"
        if suffix == ".parquet":
            data.write_bytes(content)
            list(read_train_records([str(data)], raw=True))

    # A byte that is changed may go unnoticed; a file that is cut may not.
    cuts = st.integers(1, len(content) - 1).map(lambda end: content[:end])
    check_cases(f"cut {suffix}", run, cuts, known=[content[: len(content) // 2], b""], max_examples=60)

    def read(content):
        path.write_bytes(content)
        return list(read_records(path))

    check_cases(f"damaged {suffix}", read, damaged_bytes(content), max_examples=60)


def test_configuration_keys():
    keys = [
        *("model.path", "model.dtype", "model.host_memory", "data.files", "data.max_length", "data.packing", "lora.rank"),
        *(
            "lora.target_modules",
            "optimizer.name",
            "optimizer.learning_rate",
            "steps",
            "epochs",
            "batch_size",
            "remat",
            "mesh",
        ),
        *(
            "save_every",
            "sampling.top_p",
            "engine.max_batch_size",
            "engine.kv_cache_memory",
            "x",
            "model",
            "",
            "model..path",
        ),
    ]
    values = st.sampled_from(
        [*map(str, HOSTILE), "nan", '("(",)', "[1,", "1e400", "-0", "0x10", "None", "9" * 400, "=", "'"]
    )
    override = st.builds(lambda key, value: f"--config.{key}={value}", st.sampled_from(keys), values | st.text(max_size=20))

    def run(overrides):
        with contextlib.suppress(ValueError):
            for text in overrides:
                text.encode()
        load_config(FinetuneConfig, None, overrides, {"model.path": "m", "data.files": ("d.jsonl",), "output": "o"})
        load_config(BatchConfig, None, overrides, {"model.path": "m", "input": "i", "output": "o"})

    known = [["--config.epochs=nan"], ['--config.lora.target_modules=("(",)'], ["--config.model.path"], ["--config."]]
    check_cases("configuration keys", run, st.lists(override, min_size=1, max_size=3), known=known, max_examples=300)


def test_flags(copied, tmp_path, monkeypatch, capsys):
    """Of commands that read the configuration of a model only, or that are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    flags = {
        "plan": [
            "--topology",
            "--mesh",
            "--batch-size",
            "--context",
            "--dtype",
            "--method",
            "--remat",
            "--command",
            "--chart",
        ],
        "inspect": ["--mesh", "--dtype", "--load-format"],
        "generate": ["--temperature", "--top-k", "--top-p", "--seed", "--stop", "--max-new-tokens", "--mesh", "--dtype"],
        "export": ["--max-shard-size", "--output", "--adapter"],
        "batch": ["--max-batch-size", "--metrics-port", "--num-replicas", "--input", "--chart"],
        "finetune": ["--steps", "--batch-size", "--data", "--method", "--mesh", "--adapter"],
    }
    fixed = {
        "plan": ["--model", str(copied), "--topology", "v5e:2x2"],
        "inspect": ["llama"],
        "generate": ["--model", "llama", "--prompt", "Hi"],
        "export": ["--model", "llama", "--output", "exported"],
        "batch": ["--model", "llama", "--input", "in.jsonl", "--output", "out.jsonl"],
        "finetune": ["--model", "llama", "--data", "data.jsonl", "--output", "run"],
    }
    texts = [
        *(str(value) for value in HOSTILE if "/" not in str(value)),
        "nan",
        "v5e:0x0",
        "v5e:99999x99999",
        "cpu:1",
        "h100:8",
    ]
    texts += [
        "tensor=2",
        "tensor=0",
        "fsdp=-1,data=-1",
        "x=1",
        "tensor=2,tensor=2",
        "9" * 400,
        "5GB",
        "9" * 300 + "GB",
        "train",
    ]

    def command(name):
        given = st.lists(st.tuples(st.sampled_from(flags[name]), st.sampled_from(texts)), min_size=1, max_size=2)
        return given.map(lambda pairs: [name, *fixed[name], *(text for pair in pairs for text in pair)])

    def run(arguments):
        code = main(arguments)
        assert code in (0, 1, 2), f"exit code {code}"
        errors = capsys.readouterr().err
        assert "Traceback" not in errors and len(errors) < 20_000

    known = [["plan", "--model", "a" * 5000, "--topology", "cpu:1"], ["generate", "--model", "llama", "--prompt", "\ud800"]]
    known += [["inspect", "\0"], ["finetune", "--model", "llama", "--data", "a" * 5000, "--output", "run"], ["x"], []]
    check_cases("flags", run, st.one_of(*map(command, flags)), known=known, max_examples=200)


def test_coordinator(monkeypatch):
    """Strangers at the coordinator's port, each followed by the process that it waits for."""
    host_info = collect_host_info({}, checkpoint="", inputs=(), write_dirs=["/"], memory_per_checkpoint_byte=0)
    hello = {"greeting": GREETING, "process": 1, "num_processes": 2, "host_info": host_info}

    def run(content):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cluster = Cluster(f"127.0.0.1:{port}", 2, 0, "the flags")

        def visit():
            for message in (content, dumps(hello) + b"\n"):
                with contextlib.suppress(OSError):
                    connection = connect(port)
                    connection.sendall(message)
                    visits.append(connection)
                    if message == content:
                        connection.shutdown(socket.SHUT_WR)

        visits = []
        visitor = threading.Thread(target=visit)
        visitor.start()
        try:
            connections, _ = rendezvous(cluster, host_info, 10.0)
            for connection in connections.values():
                connection.close()
        except UserError as error:  # the real process must get in
            raise AssertionError(str(error)) from error
        finally:
            visitor.join()
            for visit_ in visits:
                visit_.close()

    known = [b"[]\n", b"5\n", b"null\n", dumps({"greeting": GREETING}) + b"\n", b"x" * 100_000, b"GET / HTTP/1.1\r\n\r\n"]
    known += [spoil(dumps(hello)) + b"\n" for spoil in SPOILED.values()]
    strangers = damaged_json(hello).map(lambda text: text + b"\n") | st.binary(max_size=100)
    check_cases("coordinator", run, strangers, known=known, max_examples=100)


def connect(port):
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=1)
        threading.Event().wait(0.01)
    raise OSError("nothing listens")


def test_http_answers(monkeypatch):
    from qwen_dist.storage import http
    from qwen_dist.storage.model_files import ModelFiles

    monkeypatch.setattr(http, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(http, "MAX_DELAY_S", 0.01)
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(http, "STALL_TIMEOUT_S", 0.3)
    body = dumps(CONFIG)
    valid = b'HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\nContent-Range: bytes 0-0/100\r\nETag: "a"\r\n\r\n{'
    lines = [
        "Retry-After: \xb2",
        "Content-Range: bytes 0-0/" + "9" * 5000,
        "Content-Range: bytes x-y/z",
        "Content-Length: -5",
    ]
    lines += [
        "Location: http://[::1",
        "Location: /again",
        "Transfer-Encoding: chunked",
        "Content-Encoding: gzip",
        "X: " + "a" * 70000,
    ]
    lines += [
        "Content-Length: 99999999999999",
        "Retry-After: 1e99",
        "ETag: \x1b[31m",
        "Content-Length: 3",
        "Content-Range: bytes */100",
    ]
    statuses = [200, 206, 204, 301, 302, 304, 307, 400, 401, 403, 404, 416, 418, 429, 500, 503, 999, 0]

    def response(status, given, text):
        return (
            f"HTTP/1.1 {status} X\r\n".encode()
            + "".join(f"{line}\r\n" for line in given).encode("latin-1")
            + b"\r\n"
            + text
        )

    made = st.builds(
        response,
        st.sampled_from(statuses),
        st.lists(st.sampled_from(lines), max_size=3),
        st.sampled_from([body, b"", b"{"]),
    )
    with Answering() as server:

        def run(content):
            server.content = content
            folder = ModelFiles.open(f"http://127.0.0.1:{server.port}/m").folder
            try:
                for use in (lambda: folder.read("config.json"), lambda: folder.open("model.safetensors")):
                    with contextlib.suppress(ValueError):
                        use()
            finally:
                folder.pool.clear()

        known = [response(status, [line], body) for line in lines for status in (206, 302, 503)]
        check_cases("web server", run, made | damaged_bytes(valid), known=known, max_examples=100)


class Answering:
    """A server that answers each request with the bytes `content` and closes the connection."""

    content = b""

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                connection.recv(1 << 16)
                connection.sendall(self.content)

    def __exit__(self, *_):
        self._listener.close()


def test_journals(tmp_path):
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    with OutputFile(output, settings="s") as file:
        for number in range(5):
            file.write({"id": str(number), "text": "x" * number}, number)
    results, entries = output.read_bytes(), journal.read_bytes()

    def run(contents):
        output.write_bytes(contents[0])
        journal.write_bytes(contents[1])
        with OutputFile(output, settings="s"):
            pass

    cases = st.tuples(st.just(results) | damaged_bytes(results), st.just(entries) | damaged_bytes(entries))
    check_cases("journals", run, cases, known=[(results, b""), (b"", entries), (bytes(100), entries), (results, bytes(96))])


def test_metrics_files(tmp_path):
    entries = [{"step": step, "loss": 0.5, "learning_rate": 1e-3} for step in range(1, 6)]
    valid = b"".join(dumps(entry) + b"\n" for entry in entries)

    def run(content):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        MetricsLog(tmp_path, done=3, tensorboard=False, is_first=True).close()

    known = [valid + bytes(50) + b"\n", valid + b"{}\n", b"{}\n" + valid, *(spoil(valid) for spoil in SPOILED.values())]
    line = damaged_json(entries[0]).map(lambda text: text + b"\n" + valid)
    check_cases("metrics.jsonl", run, line | damaged_bytes(valid), known=known)
