"""`qwen-dist serve` as several processes: process 0 has the clients, and the others run the same steps."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess

import jax
import openai
import pytest
from running_server import ROOT, running_server

import qwen_dist
from qwen_dist import LLM
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.server.followers import make_request, request_fields

MESH = ("--max-batch-size", "4", "--config.warm_up=false")
LONG = {"model": "demo", "prompt": "Count:", "max_tokens": 900, "extra_body": {"min_tokens": 900}}
QUESTIONS = [f"What is {a} plus {b}?" for a in range(2, 6) for b in range(2, 5)]


@contextlib.contextmanager
def processes(directory, *arguments):
    """Yield the server, process 0 of two with a device each, and the other process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    variables = {"QWEN_DIST_COORDINATOR": coordinator, "QWEN_DIST_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    with running_server(directory, *arguments, wait=False, **variables, QWEN_DIST_PROCESS_ID="0") as server:
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"} | variables
        environment |= {name: value for name, value in os.environ.items() if name.startswith("XLA_")}  # compile as tests do
        with open(directory / "follower", "wb") as log:
            follower = subprocess.Popen(
                server.process.args,
                stdout=log,
                stderr=log,
                env=environment | {"QWEN_DIST_PROCESS_ID": "1", "HOME": str(directory)},
            )
        try:
            server.wait_until_ready()
            yield server, follower
        finally:
            if follower.poll() is None:
                follower.kill()
            follower.wait(30)


def test_requests_round_trip_through_json():
    sampling = {"temperature": 0.1, "top_k": 5, "min_p": 1 / 3, "seed": -(2**63), "stop": ("a", "\x00é😀")}
    sampling |= {"logit_bias": ((1, -100.0), (2, 1e-30)), "sequence_bias": (((1, 2), 3.5),), "begin_suppress_tokens": (7,)}
    forms = [None, {"json": {"type": "object"}}, {"choice": ("a", "b"), "after": "</think>"}, {"json_object": True}]
    for form in forms:
        for params in (sampling, {"prompt_logprobs": 3, "max_new_tokens": 0}):
            request = Request("key", (1, 2, 3), SamplingParams(**params, structured_outputs=form), "law", is_embedding=True)
            fields = json.loads(json.dumps(request_fields(request)))
            assert make_request("key", fields) == request


def test_two_processes_answer_as_one_and_stop_when_either_is_told_to(tmp_path):
    llm = LLM(qwen_dist.DEMO_MODEL, dtype="float32", max_batch_size=4, devices=jax.devices()[:1])
    expected = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS])
    with processes(tmp_path, *MESH) as (server, follower):
        client = server.client()

        def ask(question):
            given = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": question}])
            return given.choices[0].message.content, given.usage.completion_tokens

        stream = client.completions.create(stream=True, **LONG)
        next(iter(stream))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, question) for question in QUESTIONS]
            stream.close()  # its slot is free for the others, on both processes
            assert [answer.result() for answer in answers] == [(one.text, len(one.token_ids)) for one in expected]
        stream = client.completions.create(stream=True, **LONG | {"max_tokens": 200, "extra_body": {"min_tokens": 200}})
        next(iter(stream))
        follower.send_signal(signal.SIGTERM)
        server.wait_for_line("stopping: ")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert (server.process.wait(60), follower.wait(60)) == (0, 0), (tmp_path / "follower").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2"])
def test_scores_forms_and_embeddings_of_two_processes_are_those_of_one(tmp_path, mesh):
    """With fsdp the processes add up their shares of each product."""
    llm = LLM(qwen_dist.DEMO_MODEL, dtype="float32", max_batch_size=4, devices=jax.devices()[:1])
    with processes(tmp_path, *MESH, "--mesh", mesh) as (server, _):
        client = server.client()
        form = {"structured_outputs": {"choice": ["fox", "dog"]}, "seed": 3, "temperature": 1.0}
        chosen = client.completions.create(model="demo", prompt="The quick brown", n=3, extra_body=form)
        assert {choice.text for choice in chosen.choices} <= {"fox", "dog"} and len(chosen.choices) == 3
        scored = client.completions.create(model="demo", prompt="One, two", max_tokens=1, logprobs=2, echo=True)
        alone = llm.generate("One, two", max_new_tokens=1, prompt_logprobs=2)[0].prompt_logprobs
        known = [token.logprob for token in alone]
        assert scored.choices[0].logprobs.token_logprobs[1 : 1 + len(known)] == pytest.approx(known, abs=1e-4)
        vector = client.embeddings.create(model="demo", input="One, two").data[0].embedding
        assert vector == pytest.approx(llm.embed("One, two")[0].tolist(), abs=1e-5)


@pytest.mark.slow
def test_many_requests_and_cancels_on_two_processes(tmp_path):
    """150 requests of all kinds in a small cache; a third of the clients goes away. Then the server is idle, and stops."""
    kinds = [
        {},
        {"n": 2, "seed": 5, "temperature": 0.8},
        {"logprobs": 3},
        {"extra_body": {"structured_outputs": {"regex": "[0-9]{1,20}"}}},
        {"extra_body": {"repetition_penalty": 1.2}},
        {"presence_penalty": 0.5, "stop": ["the"]},
    ]
    with processes(tmp_path, *MESH, "--config.engine.kv_cache_memory=2MB") as (server, follower):

        def ask(seed):
            draw = random.Random(seed)
            wanted = {"max_tokens": draw.randrange(1, 60), "prompt": "once upon a time " * draw.randrange(1, 30)}
            wanted |= draw.choice(kinds)
            if draw.random() < 0.33:
                stream = server.client().completions.create(model="demo", stream=True, **wanted)
                next(iter(stream))
                return stream.close()
            return server.client().completions.create(model="demo", **wanted)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(150)))
        assert all(answer.choices[0].finish_reason for answer in answers if answer is not None)
        assert sum(answer is not None for answer in answers) > 75
        server.wait_for_metric("num_running", 0)
        server.process.send_signal(signal.SIGTERM)
        assert (server.process.wait(60), follower.wait(60)) == (0, 0), (tmp_path / "follower").read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_server_with_one_line(tmp_path):
    with processes(tmp_path, *MESH) as (server, follower):
        stream = server.client().completions.create(stream=True, **LONG)
        next(iter(stream))
        follower.kill()
        with pytest.raises(openai.APIError):
            list(stream)
        assert server.process.wait(30) == 1
    (line,) = [line for line in server.stderr.read_text().splitlines() if line.startswith("qwen-dist: ")]
    assert "is gone: it was killed, has crashed, or its host is down" in line
