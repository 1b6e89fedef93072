"""Measure this project on one GPU in at most eight minutes, against the GPU's own ceilings and transformers (PyTorch).

    python benchmarks/gpu.py --output DIR [--minutes 8] [--only decode-8b,peer] [--dry-run]

It needs no network and no checkpoint: random weights of the published shapes are made on the device. The pieces run in the
order of `PIECES`, each in a fresh process with a time limit, so one that fails or hangs costs only its own rows. After
each, DIR has all rows so far as results.json and results.md, and the log of the piece. "share" is of the ceiling that the
same run measured: of the copy's GB/s (what must be read and written at least once), or of the matrix product's TFLOP/s. A
ratio above 1 means that this project is faster than the peer. `--dry-run` walks through everything on a CPU, in tiny
shapes; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

# Name → seconds that it may take, the most informative first. `gpu_pieces` has a function for each, `gpu_peer` the peer's.
PIECES = {
    "machine": 30,
    "ceilings": 40,
    "parity": 60,
    "decode-8b": 110,
    "attention": 60,
    "peer": 90,
    "train": 90,
    "prefill-8b": 60,
    "decode-0.6b": 80,
    "file": 60,
    "experts": 60,
    "prefill-0.6b": 40,
    "delta-net": 60,
    "decode-parts": 90,
}
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8, help="after which no piece starts, and the running one ends")
    parser.add_argument("--only", default=",".join(PIECES), help="names of pieces, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--result", metavar="FILE", help="also write what has run to docs/results, for the README's table")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.piece:
        run_piece(options.piece, output, options.dry_run)
        return 0
    if unknown := set(options.only.split(",")) - PIECES.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(PIECES)}")
    deadline = time.monotonic() + 60 * options.minutes
    states: dict[str, str] = {}
    for name, seconds in PIECES.items():
        if name in options.only.split(","):
            # A dry run on a busy CPU may take long to import and to compile.
            limit = 150 if options.dry_run else seconds
            states[name] = start_piece(name, output, min(limit, deadline - time.monotonic()), options.dry_run)
            print(f"{name}: {states[name]}", flush=True)
            write_results(output, states)
    if options.result:
        pathlib.Path(options.result).write_text(json.dumps(as_result(output, states), indent=1) + "\n")
    return 0 if all(state.startswith("done") for state in states.values()) else 1


def start_piece(name: str, output: pathlib.Path, seconds: float, dry_run: bool) -> str:
    """Run a piece in a process of its own, and return how it ended."""
    if seconds < 5:
        return "left out: no time was left"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "compiled"))
    root = str(pathlib.Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    if dry_run:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--output", str(output), "--piece", name, *(["--dry-run"] * dry_run)]
    (output / f"{name}.jsonl").unlink(missing_ok=True)
    begin = time.monotonic()
    with open(output / f"{name}.log", "w") as log:
        try:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s, with the rows until then"
    took = f"after {time.monotonic() - begin:.0f} s"
    return f"done {took}" if code == 0 else f"failed {took}: {last_line(output / f'{name}.log')}"


def last_line(path: pathlib.Path) -> str:
    return next((line for line in reversed(path.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def run_piece(name: str, output: pathlib.Path, dry_run: bool) -> None:
    """Write the rows of a piece as they come."""
    if name == "peer":
        import gpu_peer as pieces
    else:
        import gpu_pieces as pieces  # type: ignore[no-redef]
    run: Callable[[bool], Iterable[Row]] = pieces.PIECES[name]
    with open(output / f"{name}.jsonl", "w") as file:
        for row in run(dry_run):
            file.write(json.dumps(row) + "\n")
            file.flush()


# --- results ---


def write_results(output: pathlib.Path, states: dict[str, str]) -> None:
    """Write results.json and results.md from the rows of all pieces so far."""
    rows = [row | {"piece": name} for name in states for row in read_rows(output / f"{name}.jsonl")]
    results = {"pieces": states, "rows": with_shares(rows)}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "results.md").write_text(as_markdown(results))


def read_rows(path: pathlib.Path) -> list[Row]:
    """Return the rows of a piece; the last line may be cut."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def with_shares(rows: list[Row]) -> list[Row]:
    """Add to each row its share of the ceilings, and its ratio to the peer's row of the same name."""
    ceilings = {row["what"]: row for row in rows if row["piece"] == "ceilings"}
    bandwidth = ceilings.get("copy", {}).get("gb_s")
    rate = ceilings.get("matrix product", {}).get("tflop_s")
    peers = {row["what"]: row["ms"] for row in rows if row["piece"] == "peer" and "ms" in row}
    found = []
    for row in rows:
        share = max(row.get("gb_s", 0) / (bandwidth or float("inf")), row.get("tflop_s", 0) / (rate or float("inf")))
        is_ours = row["piece"] != "peer" and "ms" in row
        ratio = peers[row["what"]] / row["ms"] if is_ours and row["what"] in peers else None
        found.append(row | ({"share": round(share, 3)} if share else {}) | ({"ratio": round(ratio, 2)} if ratio else {}))
    return found


# The kinds of runs in docs/results that a piece shows, where it ran to its end.
SHOWN_BY = {
    "decode-8b": ("inference, dense models",),
    "train": ("training, LoRA", "training, all parameters"),
    "parity": ("kernels against the plain forms",),
}


def as_result(output: pathlib.Path, states: dict[str, str]) -> Row:
    """Return what has run, in the form of docs/results."""
    machine = {row["what"]: row["note"] for row in read_rows(output / "machine.jsonl")}
    versions, devices = (
        json.loads(machine.get(name, default)) for name, default in (("versions", "{}"), ("devices", "[]"))
    )
    run = {"stage": "measured", "command": "python benchmarks/gpu.py --output DIR"}
    done = [names for piece, names in SHOWN_BY.items() if states.get(piece, "").startswith("done")]
    return {
        "platform": "gpu",
        "device": devices[0]["kind"] if devices else "unknown",
        "versions": f"jax {versions.get('jax', 'unknown')}",
        "date": time.strftime("%Y-%m-%d"),
        "runs": {name: run for names in done for name in names},
    }


COLUMNS = ("what", "ms", "tokens_s", "gb_s", "tflop_s", "share", "ratio", "note")


def as_markdown(results: dict[str, Any]) -> str:
    """Return the tables, one for each piece."""
    lines = []
    for name, state in results["pieces"].items():
        rows = [row for row in results["rows"] if row["piece"] == name]
        columns = [column for column in COLUMNS if any(column in row for row in rows)]
        lines += [f"## {name}", "", f"{state}", ""]
        if rows:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(shown(row.get(column, '')) for column in columns)} |" for row in rows]
            lines += [""]
    return "\n".join(lines)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
