"""The benchmark for GPUs walks through all its pieces on a CPU; its table says what was measured, and what was not."""

import json
import pathlib
import runpy
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GPU = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))


@pytest.mark.slow
def test_a_dry_run_walks_through_all_pieces(tmp_path):
    stored = tmp_path / "stored"
    stored.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    command += ["--minutes", "20", "--result", str(stored / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pieces"].keys() == GPU["PIECES"].keys()
    assert not [row for row in results["rows"] if "Error" in row.get("note", "")]
    measured = {row["piece"] for row in results["rows"] if row.get("ms")}
    assert measured == GPU["PIECES"].keys() - {"machine", "parity"}
    kernels = {row["what"] for row in results["rows"] if row["piece"] == "parity"}
    assert {"experts, triton", "pages, triton, 1 queries, heads of 128"} <= kernels
    assert any(row.get("ratio") for row in results["rows"] if row["piece"] == "decode-8b")
    assert "| decode 8b, B=1 |" in (tmp_path / "results.md").read_text()
    (result,) = runpy.run_path(str(ROOT / "tools" / "results_table.py"))["read_results"](stored)
    assert {run["stage"] for run in result["runs"].values()} == {"measured"} and len(result["runs"]) == 4


def test_shares_and_ratios_are_of_the_same_run():
    rows = [
        {"piece": "ceilings", "what": "copy", "ms": 1.0, "gb_s": 2000.0},
        {"piece": "ceilings", "what": "matrix product", "ms": 1.0, "tflop_s": 600.0},
        {"piece": "decode-8b", "what": "decode 8b, B=1", "ms": 10.0, "gb_s": 1500.0},
        {"piece": "peer", "what": "decode 8b, B=1", "ms": 25.0},
        {"piece": "attention", "what": "attention", "ms": 2.0, "tflop_s": 450.0},
    ]
    *_, decode, peer, attention = GPU["with_shares"](rows)
    assert (decode["share"], decode["ratio"], attention["share"]) == (0.75, 2.5, 0.75)
    assert "ratio" not in peer and "share" not in peer


def test_a_piece_that_fails_or_hangs_costs_only_its_own_rows(tmp_path, monkeypatch):
    """The rows that a stopped piece has written are in the table; a line that was cut is not."""
    (tmp_path / "ceilings.jsonl").write_text('{"what": "copy", "ms": 1.0, "gb_s": 2.0}\n{"what": "matr')
    states = {"ceilings": "stopped after 5 s, with the rows until then", "parity": "failed after 1 s: no | GPU"}
    GPU["write_results"](tmp_path, states)
    text = (tmp_path / "results.md").read_text()
    assert "## ceilings\n\nstopped after 5 s" in text and "| copy | 1 | 2 | 1 |" in text and "matr" not in text
    assert "## parity\n\nfailed after 1 s" in text


def test_a_stuck_process_is_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(GPU["start_piece"].__globals__, "__file__", str(tmp_path / "stuck.py"))
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(60)")
    begin = time.monotonic()
    assert GPU["start_piece"]("parity", tmp_path, 5, True).startswith("stopped after 5 s")
    assert time.monotonic() - begin < 20
    (tmp_path / "stuck.py").write_text("raise SystemExit('no GPU')")
    assert GPU["start_piece"]("parity", tmp_path, 30, True).endswith(": no GPU")
    assert GPU["start_piece"]("parity", tmp_path, 1, True) == "left out: no time was left"
