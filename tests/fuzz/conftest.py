from bounds import COUNTS


def pytest_terminal_summary(terminalreporter):
    """Print how the cases ended."""
    if COUNTS:
        terminalreporter.section("generated cases")
        for name, counts in COUNTS.items():
            terminalreporter.line(f"{name:30} {counts.total():5}  {dict(counts)}")
        terminalreporter.line(f"{'all':30} {sum(counts.total() for counts in COUNTS.values()):5}")
