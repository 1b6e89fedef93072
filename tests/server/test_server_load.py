"""Many requests at once, of which some are wrong and some clients go away: every other one is answered, and once."""

import concurrent.futures
import json
import random
import re

import httpx2 as httpx
import pytest
from running_server import RunningServer, running_server

from qwen_dist import DEMO_MODEL, LLM

QUESTIONS = [f"What is {a} plus {b}?" for a in range(2, 12) for b in range(2, 12)]
WRONG = [b"", b"{", b"\xff", b"[" * 3000, b"[]", b'{"messages": 3}', b'{"messages": [], "n": 0}']
WRONG += [b'{"messages": "' + b"x" * 300_000 + b'"}']
AT_A_TIME = 32


def resident_bytes(server: RunningServer) -> int:
    with open(f"/proc/{server.pid}/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1])


def ask(web: httpx.Client, number: int, expected: dict[str, str]) -> str:
    """Send request `number`; return what it was, after checking its answer."""
    draw = random.Random(number)
    question = draw.choice(QUESTIONS)
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    kind = draw.choices(["whole", "stream", "gone", "wrong"], [5, 5, 2, 2])[0]
    path, headers = "/v1/chat/completions", {"content-type": "application/json"}
    if kind == "wrong":
        answer = web.post(path, content=draw.choice(WRONG), headers=headers)
        assert answer.status_code in (400, 413) and answer.json()["error"]["message"]
        return kind
    if kind == "whole":
        answer = web.post(path, json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected[question], "stop")
        return kind
    with web.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        if kind == "gone":
            for _ in range(draw.randrange(6)):
                next(lines)
            return kind
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == expected[question]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    return kind


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [1_000, 10_000])
def test_many_requests(num_requests, tmp_path):
    llm = LLM(DEMO_MODEL, dtype="float32", max_batch_size=32)
    answers = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], temperature=0)
    expected = {question: answer.text for question, answer in zip(QUESTIONS, answers, strict=True)}
    with running_server(tmp_path, "--max-batch-size", "16", "--max-body-size", "200kB") as server:
        limits = httpx.Limits(max_connections=AT_A_TIME, max_keepalive_connections=AT_A_TIME)
        web = httpx.Client(base_url=server.url, timeout=600, limits=limits)
        with web, concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            first, rest = range(num_requests // 4), range(num_requests // 4, num_requests)
            kinds = list(pool.map(lambda number: ask(web, number, expected), first))
            before = resident_bytes(server)
            kinds += list(pool.map(lambda number: ask(web, number, expected), rest))
        for name in ("num_running", "num_waiting", "held_positions"):
            server.wait_for_metric(name, 0)
        growth = resident_bytes(server) - before
        print(f"{len(kinds)} requests, memory grew by {growth / 1e6:.1f} MB in the last three quarters of them")
        assert growth < 30e6
        assert server.process.poll() is None and "Traceback" not in server.stderr.read_text()
    assert {kind: kinds.count(kind) for kind in ("whole", "stream", "gone", "wrong")}.keys() == set(kinds)
