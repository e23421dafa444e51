"""The commands for versions in a registry, against a real etcd and servers that only say what they hold."""

import json
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from engrampool_proto.registry.etcd import Held, Member, NotHeldError, Registry, RegistryError, State, VersionError
from engrampool_server.commands.versions import activate, publish, retire, rollback, versions
from engrampool_server.files.patches.patch import write_patch
from engrampool_server.files.table_files import PackedModel
from etcd_process import EtcdProcess, running_etcd
from server_fixtures import LIMIT_S, SPEC, VOCAB, lasting_address, pack, version_of

PROGRAM = Path(sysconfig.get_path("scripts")) / "engrampool"
WHOLE = {table.layer: (0, table.num_rows) for table in SPEC.tables}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory) -> Iterator[EtcdProcess]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, Path]:
    """Two versions of one model."""
    directory = tmp_path_factory.mktemp("packed")
    return pack(directory / "old"), pack(directory / "new", change=True)


@pytest.fixture
def url(etcd, request, monkeypatch) -> str:
    """A pool of this test's own, which the environment names."""
    monkeypatch.setenv("ENGRAMPOOL_REGISTRY", etcd.url(request.node.name))
    return etcd.url(request.node.name)


def run(command: click.Command, *arguments: object) -> tuple[str, str]:
    """Standard output and error of a command, which raises what it raises."""
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def holding(address: str, *names: str) -> Member:
    return Member(address, tuple(Held("small", name, WHOLE) for name in names))


@contextmanager
def servers(url: str, load: Callable[[Member, State], Member]) -> Iterator[None]:
    """Two servers; whenever the registry changes, each in turn is what `load` makes of it."""
    stop = threading.Event()

    def serve(address: str, registry: Registry) -> None:
        member = Member(address)
        registry.join(member, 60)

        def changed(state: State) -> None:
            nonlocal member
            now = load(member, state)
            if now != member:
                member = now
                registry.join(member)

        registry.follow(changed, stop)
        registry.leave()

    threads = [threading.Thread(target=serve, args=(f"h:{index}", Registry(url))) for index in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def loads(member: Member, state: State) -> Member:
    """Holds what is published, the second server after the first."""
    names = [one.version for one in state.published]
    first = state.members.get("h:1")
    ready = [name for name in names if member.address == "h:1" or (first and first.of("small", name))]
    return holding(member.address, *ready)


def fails(member: Member, state: State) -> Member:
    """The first server goes on loading, the second cannot."""
    if member.address == "h:1":
        return member
    return replace(member, failed={one.version: "no such directory" for one in state.published})


def test_a_version_from_publish_to_retire(url, packed, monkeypatch):
    old, new = map(version_of, packed)
    monkeypatch.chdir(packed[0].parent)
    assert run(publish, "old") == (f"published small {old}\n", "")
    [published] = Registry(url).read().published
    assert (published.location, published.rows) == (str(packed[0]), {2: 6500, 9: 4100})
    with servers(url, loads):
        said, told = run(activate, "small", old[:6])
        assert said == f"small {old} is active, before it none was\n"
        assert all(line.startswith(f"waiting: small {old} cannot be active yet: ") for line in told.splitlines())
        said, _ = run(publish, packed[1], "--activate")
        assert said == f"published small {new}\nsmall {new} is active, before it {old}\n"
        assert run(rollback, "small")[0] == f"small {old} is active, before it {new}\n"
        with pytest.raises(VersionError, match="is active"):
            run(retire, "small", old)
        found = json.loads(run(versions, "--json")[0])
        assert found["servers"] == ["h:1", "h:2"]
        model = found["models"]["small"]
        assert (model["active"], model["previous"]) == (old, new)
        about = {"base": None, "missing": [], "conflict": None, "held": ["h:1", "h:2"], "failed": {}}
        assert model["versions"] == {
            old: {"location": str(packed[0]), **about},
            new: {"location": str(packed[1]), **about},
        }
        assert run(retire, "small", new[:8]) == (f"retired small {new}\n", "")
    assert run(versions)[0].splitlines() == [
        "servers: none",
        "small",
        f"  {old}, active: {packed[0]}",
        "    held by no server",
        "    no server holds rows 0..6499 of layer 2",
        "    no server holds rows 0..4099 of layer 9",
    ]


def test_what_it_waits_for_is_said_when_that_changes(url, packed):
    version = version_of(packed[0])
    run(publish, packed[0])
    with pytest.raises(NotHeldError, match="no server holds"):
        run(activate, "small", version, "--wait", 0)
    one, other = Registry(url), Registry(url)
    one.join(holding("h:1"), 60)
    other.join(holding("h:2", "f" * 32), 60)
    command = [PROGRAM, "activate", "small", version]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        rows = "no server holds rows 0..6499 of layer 2, rows 0..4099 of layer 9"
        start = f"waiting: small {version} cannot be active yet: "
        assert waiting.stderr.readline() == f"{start}{rows}; still to load it: h:2\n"
        one.join(holding("h:1", version))
        assert waiting.stderr.readline() == f"{start}still to load it: h:2\n"
        other.join(holding("h:2", version))
        assert waiting.communicate(timeout=LIMIT_S) == (f"small {version} is active, before it none was\n", "")
    one.leave()
    other.leave()


def test_a_server_that_failed_ends_the_wait(url, packed):
    with (
        servers(url, fails),
        pytest.raises(VersionError, match=r"no server holds.*; h:2 could not load it: no such dir"),
    ):
        run(publish, packed[0], "--activate")


def test_another_specification_is_refused_before_it_is_published(url, packed, tmp_path):
    """So that no server loads it for nothing."""
    other = pack(tmp_path / "other", replace(SPEC, vocab_size=VOCAB, token_map=None))
    with servers(url, loads):
        run(publish, packed[0], "--activate")
        before = Registry(url).read()
        with pytest.raises(VersionError, match=r"another specification .* another model name"):
            run(publish, other, "--activate")
        assert Registry(url).read().published == before.published


def test_a_version_that_servers_hold_and_nobody_published_is_shown_and_may_be_retired(url, packed):
    member, registry = Registry(url), Registry(url)
    active, other = "a" * 32, "b" * 32
    member.join(replace(holding("h:1", active, other), active={"small": active}), 60)
    assert run(versions)[0].splitlines() == [
        "servers: h:1",
        "small",
        f"  {active}, active as servers know it: activate it: not published",
        "    held by h:1",
        f"  {other}: not published",
        "    held by h:1",
    ]
    assert json.loads(run(versions, "--json")[0])["models"]["small"]["known"] == active
    with pytest.raises(VersionError, match="is active"):
        run(retire, "small", active[:6])
    assert run(retire, "small", other[:6]) == (f"retired small {other}\n", "")
    assert set(registry.read().retired) == {("small", other)}
    member.leave()


def test_a_wait_ends(url, packed):
    run(publish, packed[0])
    with pytest.raises(NotHeldError, match=r"no server holds rows 0\.\.6499 of layer 2.*; waited 0.2 s"):
        run(activate, "small", version_of(packed[0]), "--wait", 0.2)


def test_a_patch_is_published_with_its_base(url, packed, tmp_path):
    old = version_of(packed[0])
    with PackedModel.open(packed[0]) as base:
        new = write_patch(base, {2: (np.array([7], np.uint64), np.ones((1, 264), np.uint8))}, tmp_path / "patch")
    with pytest.raises(VersionError, match=f"a patch of {old}, which is not published"):
        run(publish, tmp_path / "patch")
    run(publish, packed[0])
    run(publish, tmp_path / "patch")
    assert f"  {new}: {tmp_path / 'patch'}, a patch of {old}\n" in run(versions)[0]
    with pytest.raises(VersionError, match="is the base"):
        run(retire, "small", old)


def test_short_and_unknown_names(url, packed):
    version = version_of(packed[0])
    run(publish, packed[0])
    with pytest.raises(VersionError, match=f"6 digits or more.* may be {version}"):
        run(retire, "small", version[:5])
    for command, *arguments in ((activate, "small", "0" * 8), (retire, "small", "0" * 8), (retire, "other", version)):
        with pytest.raises(VersionError, match="not published"):
            run(command, *arguments)
    with pytest.raises(VersionError, match="no previous version"):
        run(rollback, "other")


def test_no_registry(packed):
    usage = CliRunner().invoke(versions, ["--registry", "http://h:1"])
    assert (usage.exit_code, "not etcd://HOST:PORT" in usage.output) == (2, True)
    nobody = lasting_address()
    with pytest.raises(RegistryError, match="takes no connection"):
        run(publish, packed[0], "--activate", "--registry", f"etcd://{nobody}")
    refused = CliRunner().invoke(publish, ["ftp://h/x", "--registry", f"etcd://{nobody}"])
    assert (refused.exit_code, "not a URL of" in refused.output) == (2, True)
