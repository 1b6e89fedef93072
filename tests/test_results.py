"""The table of what has run where is what the script makes of the stored results, and these say how they were made."""

import json
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "tools" / "results_table.py"))


def test_the_readme_has_the_table_of_the_stored_results():
    text = (ROOT / "README.md").read_text()
    table = TABLE["make_table"](TABLE["read_results"]())
    assert TABLE["with_table"](text, table) == text, "run `python tools/results_table.py --write`"


def test_every_result_names_a_command_that_exists():
    for result in TABLE["read_results"]():
        for run in result["runs"].values():
            program, *arguments = run["command"].split()
            files = [word for word in arguments if word.endswith(".py")]
            assert program in ("python", "pytest", "qwen-dist") and (files or program == "qwen-dist")
            assert all((ROOT / file).exists() for file in files), run


def test_the_furthest_stage_of_each_platform_is_in_the_table(tmp_path):
    for name, platform, stage in (("a", "gpu", "lowered"), ("b", "gpu", "measured"), ("c", "tpu", "compiled")):
        runs = {"training, LoRA": {"stage": stage, "command": "pytest"}}
        result = {"platform": platform, "device": f"device {name}", "versions": "jax", "date": "2026-01-02", "runs": runs}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    table = TABLE["make_table"](TABLE["read_results"](tmp_path))
    assert "| training, LoRA | – | measured | compiled |" in table and "- CPU: nothing yet" in table
    (tmp_path / "a.json").write_text(json.dumps(result | {"platform": "abacus", "runs": {"x": {"stage": "dreamt"}}}))
    with pytest.raises(ValueError, match=r"a\.json: there is no run 'x', no stage 'dreamt', no platform 'abacus'"):
        TABLE["read_results"](tmp_path)
