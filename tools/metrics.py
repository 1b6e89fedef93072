"""Print the size and style of the code, room by room: lines, functions, classes, comments, docstrings, types and checks.

    python tools/metrics.py                    this tree
    python tools/metrics.py --against REV      this tree compared with a commit

A room is a folder of `qwen_dist`, or a file directly in it. `fn` counts every function, nested ones too, from `def` to its
last line. `comments` are comments per 100 lines, `docs` the share of lines in docstrings, `typed` the share of functions
with a return type, `raise:assert` the number of each.
"""

from __future__ import annotations

import argparse
import ast
import io
import pathlib
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator

COLUMNS = "room|files|lines|file med/p90/max|fn med/p90/max|classes|comments|docs|typed|raise:assert".split("|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    against = parser.parse_args().against
    root = pathlib.Path(__file__).parent.parent
    print_tree("this tree", root)
    if against:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "-C", root, "archive", against], capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            print()
            print_tree(against, pathlib.Path(folder))


def print_tree(name: str, root: pathlib.Path) -> None:
    rooms: dict[str, list[pathlib.Path]] = {"qwen_dist": []}
    for path in sorted((root / "qwen_dist").rglob("*.py")):
        room = path.relative_to(root / "qwen_dist").parts[0]
        rooms["qwen_dist"].append(path)
        rooms.setdefault(room, []).append(path)
    for folder in ("tests", "benchmarks"):
        rooms[folder] = sorted((root / folder).rglob("*.py"))
    rows = [row(room, files) for room, files in rooms.items() if room != "__init__.py"]
    widths = [max(len(cells[column]) for cells in (COLUMNS, *rows)) for column in range(len(COLUMNS))]
    print(name)
    for cells in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def row(room: str, files: list[pathlib.Path]) -> tuple[str, ...]:
    texts = [path.read_text(encoding="utf-8") for path in files]
    sizes = [len(text.splitlines()) for text in texts]
    trees = [ast.parse(text) for text in texts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    typed = sum(node.returns is not None for node in functions)
    count = {kind: sum(isinstance(node, kind) for node in nodes) for kind in (ast.ClassDef, ast.Raise, ast.Assert)}
    lines = max(sum(sizes), 1)
    return (
        room,
        str(len(files)),
        str(sum(sizes)),
        spread([size for size in sizes if size]),
        spread(lengths),
        str(count[ast.ClassDef]),
        f"{100 * sum(map(comment_lines, texts)) / lines:.1f}",
        f"{sum(map(docstring_lines, trees)) / lines:.0%}",
        f"{typed / max(len(functions), 1):.0%}",
        f"{count[ast.Raise]}:{count[ast.Assert]}",
    )


def spread(sizes: list[int]) -> str:
    """Median, 90th percentile and maximum."""
    if not sizes:
        return "-"
    ordered = sorted(sizes)
    return f"{statistics.median(ordered):.0f}/{ordered[int(0.9 * (len(ordered) - 1))]}/{ordered[-1]}"


def comment_lines(text: str) -> int:
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def docstring_lines(tree: ast.Module) -> int:
    return sum(last - first + 1 for first, last in docstrings(tree))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                yield first.lineno, first.end_lineno or first.lineno


if __name__ == "__main__":
    main()
