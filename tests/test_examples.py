"""Every program in examples/ runs and prints what it should: in at most 60 lines, or as a notebook of cells."""

import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
QUESTIONS = "What is the capital of France?\nWhat is 2 plus 3?\n"
# Arguments, and a pattern of what is printed.
RUNS = {
    "generate": ([], r"The capital of France is Paris\.(?s:.*)stream: The capital of France is Paris\."),
    "batch_in_python": (["questions.txt", "out.jsonl"], r"2 answers in out\.jsonl"),
    "training_loop": (["model"], r"step 20: loss 0\.\d+"),
    "lora": (["adapter"], r"What is the capital of Atlantis\? Poseidonis\."),
    "own_mesh": ([], r"\(384, 192\) on each device(?s:.*)differ from one device's by \d\.\de-0[5-9]"),
    "new_architecture": ([], r"loss \d\.\d+ → 0\.\d+ after 60 steps"),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path):
    path, (arguments, printed) = EXAMPLES / f"{name}.py", RUNS[name]
    assert len(path.read_text().splitlines()) <= 60
    (tmp_path / "questions.txt").write_text(QUESTIONS)
    done = subprocess.run([sys.executable, path, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(printed, done.stdout), done.stdout


NOTEBOOKS = {
    "tour": r"The capital of France is Paris\.(?s:.*)within bounds: \d+ comparisons, none beyond",
    "finetune_lora": r"0 before, 1[0-2] after, of 12(?s:.*)What is the capital of Japan\? The capital of Japan is Tokyo",
}


def test_every_notebook_is_run():
    assert {path.stem for path in (EXAMPLES / "notebooks").glob("*")} == NOTEBOOKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    path = EXAMPLES / "notebooks" / f"{name}.py"
    assert path.read_text(encoding="utf-8").startswith("# %% [markdown]\n# # ")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(NOTEBOOKS[name], done.stdout), done.stdout
