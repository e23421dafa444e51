"""Settings of every test: property tests draw the same examples each run, and a slow machine fails none of them."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "engrampool",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("engrampool")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In one line, how much was not run, and why or how to have it run: each reason says so."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        told = "; ".join(f"{count} x {reason.removeprefix('Skipped: ')}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not run: {told}")
