"""Settings of every test: property tests draw the same examples each run, and a slow machine fails none of them."""

from collections import Counter
from pathlib import Path

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
settings.register_profile("quick", settings.get_profile("engrampool"), max_examples=10)
settings.load_profile("engrampool")

# Whatever starts other programs, waits for something to run out, or reads a real tokenizer again and again.
_SLOW_FOLDERS = {"bench", "deploy", "integration"}
_SLOW_FILES = {
    "client/test_aio.py",
    "client/test_commands.py",
    "client/pool/test_connecting.py",
    "client/pool/test_degradation.py",
    "client/doctor/test_command.py",
    "client/pool/test_following.py",
    "client/pool/test_forgotten_connections.py",
    "client/lookup/test_giving_up.py",
    "client/pool/test_handshake.py",
    "client/pool/test_replicas.py",
    "client/pool/test_shards.py",
    "client/test_status.py",
    "proto/test_builders.py",
    "proto/test_golden.py",
    "proto/registry/test_etcd.py",
    "server/test_attach.py",
    "server/processes/test_children.py",
    "server/memory/test_hasher.py",
    "server/test_jit.py",
    "server/telemetry/test_log.py",
    "server/files/test_pack.py",
    "server/files/test_raw_model.py",
    "server/memory/test_segments.py",
    "server/files/test_sources.py",
    "server/commands/test_versions.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-quick` leaves out."""
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        if path.parts[0] in _SLOW_FOLDERS or path.as_posix() in _SLOW_FILES:
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In one line, how much was not run, and why or how to have it run: each reason says so."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        told = "; ".join(f"{count} x {reason.removeprefix('Skipped: ')}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not run: {told}")
