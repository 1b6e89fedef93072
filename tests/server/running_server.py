"""Servers as users start them: a process on a free port, and OpenAI's client."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import httpx2 as httpx
import openai

import qwen_dist
from qwen_dist.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
# Tokens before each token of a scripted answer that must come before it.
CONTEXT = 24


class RunningServer:
    """A process that serves at `url`; `stderr` is a file with what it writes."""

    def __init__(self, process: subprocess.Popen, stderr: pathlib.Path, key: str):
        self.process, self.stderr, self.key, self.url = process, stderr, key, ""

    def wait_until_ready(self, seconds: float = 240) -> None:
        line = b""
        end = time.monotonic() + seconds
        while not line and time.monotonic() < end and self.process.poll() is None:
            line = self.process.stdout.readline()
        assert line, self.stderr.read_text()
        self.url = json.loads(line)["url"]

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, **more) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120, **more)

    def post(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        given = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, content=content, headers=given, timeout=60)

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {self.key}"}, timeout=60).text
        return sum(float(value) for value in re.findall(rf"^qwen_dist_server_{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    def wait_for_metric(self, name: str, value: float, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {now} and not {value}"
            time.sleep(0.02)

    def wait_for_line(self, begin: str, seconds: float = 20) -> None:
        """Wait until the server has written a line to stderr that begins so."""
        end = time.monotonic() + seconds
        while not any(line.startswith(begin) for line in self.stderr.read_text().splitlines()):
            assert time.monotonic() < end, self.stderr.read_text()
            time.sleep(0.02)


@contextlib.contextmanager
def running_server(
    directory: pathlib.Path,
    *arguments: str,
    key: str = "any",
    program: Sequence[str] = ("-m", "qwen_dist"),
    wait: bool = True,
    **environment: str,
) -> Iterator[RunningServer]:
    """Start `qwen-dist serve`, and end it at last.

    Args:
      directory: for a file with what it writes to stderr.
      arguments: of the command.
      key: that clients send.
      program: of Python, that runs the command line.
      wait: until it is ready.
      environment: variables.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, *program, "serve", "--port", "0", "--json", "--dtype", "float32", *arguments]
    stderr = directory / "stderr"
    with open(stderr, "wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment)
    try:
        server = RunningServer(process, stderr, key)
        if wait:
            server.wait_until_ready()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()


TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- elif enable_thinking is defined %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


def scripted_model(directory: pathlib.Path, answers: Mapping[str, str]) -> pathlib.Path:
    """Return the demonstration model with a template for tools, which answers some prompts as told.

    Its generation_config.json has a bias for each token of these answers, after the tokens before it. The key of an answer
    is the end of the prompt's text.
    """
    model = directory / "scripted"
    shutil.copytree(qwen_dist.DEMO_MODEL, model)
    tokenizer = Tokenizer.open(str(model))
    biases = []
    for prompt, answer in answers.items():
        before = tokenizer.encode(prompt, add_special_tokens=False)[-CONTEXT:]
        for token in [*tokenizer.encode(answer), tokenizer.eos_token_id]:
            biases.append([[*before[-CONTEXT:], token], 1000.0])
            before.append(token)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"sequence_bias": biases, "max_new_tokens": 300}))
    return model
