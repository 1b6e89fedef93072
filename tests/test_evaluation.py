"""lm-eval's scores of the demonstration model are those of its own type `hf`, in float32."""

import json
import math
import pathlib
import sys

import pytest

from qwen_dist import DEMO_MODEL

sys.path.insert(0, str(pathlib.Path(__file__).parent / "server"))
from running_server import running_server

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": f"What is {a} plus {b}?", "choices": [f"The answer is {a + b + n}." for n in (0, 1, -1)], "answer": 0}
    for a in range(2, 8)
    for b in (3, 4)
]
QUESTIONS += [{"question": "", "choices": ["The sky is blue.", "Sky the blue is."], "answer": 0}]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
{more}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]"""
ANSWER = """doc_to_text: "Question: {{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]"""
TEXT = """doc_to_text: ""
doc_to_target: "{{question}} {{choices | join(' ')}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"""
TASKS = {"choices": ("multiple_choice", CHOICE), "answers": ("generate_until", ANSWER)}
TASKS |= {"texts": ("loglikelihood_rolling", TEXT)}


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """model, arguments and tasks -> the results, and the responses of each sample by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import qwen_dist.evaluation  # noqa: F401

    directory = tmp_path_factory.mktemp("tasks")
    (directory / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, (kind, more) in TASKS.items():
        text = TASK.format(name=name, kind=kind, data=directory / "questions.jsonl", more=more)
        (directory / f"{name}.yaml").write_text(text)

    def run(model: str, arguments: dict, tasks: list[str], **more):
        manager = TaskManager(include_path=str(directory), include_defaults=False)
        found = lm_eval.simple_evaluate(model, arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more)
        results = {
            task: {key: value for key, value in of_task.items() if isinstance(value, float) and not math.isnan(value)}
            for task, of_task in found["results"].items()
        }
        responses = {task: [one["resps"] for one in samples] for task, samples in found["samples"].items()}
        return results, responses

    return run


OURS = {"pretrained": str(DEMO_MODEL), "dtype": "float32"}


@pytest.fixture(scope="module")
def expected(evaluate):
    return evaluate("hf", OURS | {"device": "cpu"}, list(TASKS), batch_size=1)


def rounded(results: dict) -> dict:
    """As lm-eval prints them, but no more digits than a sum of float32 over a text has."""
    return {task: {key: f"{value:.5g}" for key, value in values.items()} for task, values in results.items()}


def test_scores_are_those_of_hf(evaluate, expected):
    results, responses = evaluate("qwen_dist", OURS, list(TASKS), batch_size=8)
    assert rounded(results) == rounded(expected[0])
    names = {key.partition(",")[0] for values in results.values() for key in values}
    assert names >= {"acc", "exact_match", "byte_perplexity"}
    assert 0 < results["choices"]["acc,none"] < 1 or results["answers"]["exact_match,none"] > 0, "not all alike"
    assert responses["answers"] == expected[1]["answers"]
    for ours, theirs in zip(responses["choices"], expected[1]["choices"], strict=True):
        for ((total, is_greedy),), ((wanted, was_greedy),) in zip(ours, theirs, strict=True):
            assert total == pytest.approx(wanted, abs=2e-4) and is_greedy == was_greedy


def test_lm_eval_runs_against_the_server(evaluate, expected, tmp_path):
    with running_server(tmp_path, "--max-batch-size", "4", "--config.warm_up=false") as server:
        arguments = {"base_url": f"{server.url}/v1/completions", "model": "demo", "num_concurrent": 2}
        arguments |= {"tokenizer": str(DEMO_MODEL), "tokenizer_backend": "huggingface", "max_length": 1000}
        results, _ = evaluate("local-completions", arguments, ["choices", "answers"], batch_size=4)
        chat = {"base_url": f"{server.url}/v1/chat/completions", "model": "demo", "num_concurrent": 2}
        chats, _ = evaluate("local-chat-completions", chat, ["answers"], apply_chat_template=True)
    assert rounded(results) == rounded({task: expected[0][task] for task in results})
    assert "exact_match,none" in chats["answers"]
