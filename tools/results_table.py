"""The table of what has run where, from the results in docs/results: print it, or write it into README.md.

    python tools/results_table.py [--write]

A result is a JSON file: the platform ("cpu", "gpu" or "tpu"), the device, the versions, the date, and for each kind of run
how far it came there and the command that shows it. `benchmarks/gpu.py` writes such a file for the GPU that it ran on
(`--result docs/results/NAME.json`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
BEGIN, END = "<!-- results: tools/results_table.py writes this -->\n", "<!-- end of results -->"
PLATFORMS = {"cpu": "CPU", "gpu": "NVIDIA GPU", "tpu": "TPU"}
RUNS = (
    "inference, dense models",
    "inference, mixtures of experts",
    "inference, hybrid models",
    "training, LoRA",
    "training, all parameters",
    "kernels against the plain forms",
)
# How far a run came, the furthest last.
STAGES = {
    "lowered": "lowered to the compiler's input with the kernels of its backend, on a CPU",
    "interpreted": "interpreted on a CPU",
    "compiled": "compiled by the device's compiler, not run",
    "measured": "run and measured on the device",
}


def read_results(folder: pathlib.Path = RESULTS) -> list[dict[str, Any]]:
    """Return the results, the newest first. Raises ValueError for a file that is not one."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        wrong = [f"run {name!r}" for name in result["runs"] if name not in RUNS]
        wrong += [f"stage {run['stage']!r}" for run in result["runs"].values() if run["stage"] not in STAGES]
        wrong += [] if result["platform"] in PLATFORMS else [f"platform {result['platform']!r}"]
        if wrong:
            raise ValueError(f"{path.name}: there is no {', no '.join(wrong)}")
        results.append(result | {"name": path.name})
    return sorted(results, key=lambda result: result["date"], reverse=True)


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: of each platform the furthest stage, and where that was."""
    furthest: dict[tuple[str, str], str] = {}
    for result in results:
        for name, run in result["runs"].items():
            key = name, result["platform"]
            furthest[key] = max(furthest.get(key, run["stage"]), run["stage"], key=list(STAGES).index)
    lines = [f"| | {' | '.join(PLATFORMS.values())} |", "|---" * (len(PLATFORMS) + 1) + "|"]
    for name in RUNS:
        lines.append(f"| {name} | {' | '.join(furthest.get((name, platform), '–') for platform in PLATFORMS)} |")
    used = [stage for stage in reversed(STAGES) if stage in furthest.values()]
    lines += ["", "; ".join(f"*{stage}*: {STAGES[stage]}" for stage in used) + ".", ""]
    for platform, title in PLATFORMS.items():
        places = [f"{one['device']} ({one['versions']}, {one['date']})" for one in results if one["platform"] == platform]
        lines.append(f"- {title}: {'; '.join(places) or 'nothing yet'}")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str:
    """Return a page with the table in the place of the one that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    table = make_table(read_results())
    if not options.write:
        print(table, end="")
        return
    page = ROOT / "README.md"
    page.write_text(with_table(page.read_text(), table))


if __name__ == "__main__":
    main()
