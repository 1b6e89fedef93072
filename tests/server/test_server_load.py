"""Many requests at once, some wrong, some slowly read and some left by their clients: every other is answered, and once."""

import concurrent.futures
import json
import random
import re
import time

import httpx2 as httpx
import pytest
from running_server import RunningServer, running_server
from wrong_bodies import CHAT, OK, all_wrong, chat

from qwen_dist import DEMO_MODEL, LLM

QUESTIONS = [f"What is {a} plus {b}?" for a in range(2, 12) for b in range(2, 12)]
WRONG = all_wrong()
KINDS = {"whole": 5, "stream": 5, "slow": 1, "gone": 2, "wrong": 2, "key": 1, "huge": 1}  # and how often they come
AT_A_TIME = 64
KEY = {"authorization": "Bearer right"}


def resident_bytes(server: RunningServer) -> int:
    with open(f"/proc/{server.pid}/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1])


def ask(web: httpx.Client, number: int, expected: dict[str, str]) -> str:
    """Send request `number`; return what it was, after checking its answer."""
    draw = random.Random(number)
    question = draw.choice(QUESTIONS)
    body = {"messages": chat(question), "temperature": 0}
    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
    if kind in ("wrong", "key", "huge"):
        check_refused(web, kind, draw)
        return kind
    if kind == "whole":
        answer = web.post(CHAT, json=body, headers=KEY)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected[question], "stop")
        return kind
    with web.stream("POST", CHAT, json=body | {"stream": True}, headers=KEY) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        if kind == "gone":
            for _ in range(draw.randrange(6)):
                next(lines)
            return kind
        events = []
        for line in lines:
            events += [line.removeprefix("data: ")] * bool(line)
            time.sleep(0.05 * (kind == "slow"))
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == expected[question]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    return kind


def check_refused(web: httpx.Client, kind: str, draw: random.Random) -> None:
    path, content = draw.choice(WRONG) if kind == "wrong" else (CHAT, json.dumps(OK).encode())
    content += b" " * (300_000 * (kind == "huge"))
    key = {"authorization": "Bearer wrong"} if kind == "key" else KEY
    answer = web.post(path, content=content, headers={"content-type": "application/json"} | key)
    assert answer.status_code == {"wrong": 400, "key": 401, "huge": 413}[kind], (content[:1000], answer.text)
    assert answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("num_requests", [1_000, 10_000])
def test_many_requests(num_requests, tmp_path):
    llm = LLM(DEMO_MODEL, dtype="float32", max_batch_size=32)
    answers = llm.chat([chat(question) for question in QUESTIONS], temperature=0)
    expected = {question: answer.text for question, answer in zip(QUESTIONS, answers, strict=True)}
    flags = ("--max-batch-size", "16", "--max-body-size", "200kB")
    with running_server(tmp_path, *flags, key="right", QWEN_DIST_API_KEY="right") as server:
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
    assert set(kinds) == set(KINDS) and len(set(WRONG)) >= 200
