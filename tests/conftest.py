"""Settings of every test: property tests draw the same examples each run, and a slow machine fails none of them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from engrampool_client import testing
from engrampool_proto.token_map import TokenMap
from prefork import PREFORK

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
    "client/compute/test_forms.py",
    "client/pool/test_connecting.py",
    "client/pool/test_degradation.py",
    "client/doctor/test_command.py",
    "client/pool/test_follower.py",
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
    "proto/kernels/test_hasher.py",
    "proto/kernels/test_jit.py",
    "server/telemetry/test_log.py",
    "server/files/test_pack.py",
    "server/files/test_raw_model.py",
    "server/memory/test_segments.py",
    "server/files/test_sources.py",
    "server/commands/test_versions.py",
}


@pytest.fixture(scope="session", autouse=True)
def large_tokenizers_are_mapped_once() -> Iterator[None]:
    """A real tokenizer takes seconds to map: whoever maps the same bytes again is given the same map."""
    from_tokenizer, made = TokenMap.from_tokenizer, {}

    def once(path: Path) -> TokenMap:
        if not path.is_file() or path.stat().st_size < 1 << 20:
            return from_tokenizer(path)
        raw = path.read_bytes()
        if raw not in made:
            made[raw] = from_tokenizer(path)
        return made[raw]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenMap, "from_tokenizer", once)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-quick` leaves out."""
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        if path.parts[0] in _SLOW_FOLDERS or path.as_posix() in _SLOW_FILES:
            item.add_marker("slow")


# Most servers of tests are forks, as that is cheaper; those of tests with the marker `executed` are programs started.
testing.start_program = PREFORK.start


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    PREFORK.is_on = item.get_closest_marker("executed") is None


def pytest_unconfigure() -> None:
    PREFORK.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In one line, how much was not run, and why or how to have it run: each reason says so."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        told = "; ".join(f"{count} x {reason.removeprefix('Skipped: ')}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not run: {told}")
