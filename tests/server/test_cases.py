"""docs/openai-cases.md names tests that exist, and says of each case whether it passes."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "openai-cases.md"


def test_every_case_is_bound_to_a_test_or_has_a_reason():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| test_")]
    assert len(rows) > 50
    seen: set[str] = set()
    for cases, result, reason in rows:
        named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", reason)
        assert (result == "pass") == bool(named) and result in ("pass", "does not apply"), cases
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)
        names = re.findall(r"test_\w+(?:: .*)?", cases)
        assert names and not seen & set(names), cases
        seen |= set(names)
