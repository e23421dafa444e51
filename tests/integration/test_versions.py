"""Servers in real processes whose models come and go by a real registry, while they are asked."""

import base64
import fcntl
import json
import os
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from engrampool_client.testing import ServerProcess
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.patches.patch import patch as make_patch
from engrampool_server.files.table_writer import write_tables
from etcd_process import EtcdProcess, running_etcd
from pooled import IDS, Asker, answers, described, member, published, serving, wait_held
from server_fixtures import LIMIT_S, SPEC, RawPool, eventually, pack, refusal, scrape


@pytest.fixture(scope="module")
def etcd(tmp_path_factory) -> Iterator[EtcdProcess]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two versions, another with some rows of the second, and a patch that makes it of the first."""
    where = tmp_path_factory.mktemp("versions")
    pack(where / "first", block_bytes=100_000)
    pack(where / "second", change=True, block_bytes=100_000)

    def fill(table, start, out):
        ids = np.arange(start, start + len(out), dtype=np.uint64)
        out[:] = synthetic_rows(table, ids)
        out[:, -1] ^= ids % 10 == 0

    write_tables(where / "mixed", SPEC, {}, fill, block_bytes=100_000)
    make_patch(where / "first", where / "mixed", where / "patch")
    return where


def children(server: ServerProcess) -> dict[int, str]:
    """The command line of every process that the server started, by process id."""
    found = {}
    for pid in map(int, Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()):
        with suppress(FileNotFoundError):  # it ended just now
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text()
    return found


def maps(server: ServerProcess, text: str) -> list[str]:
    """Where this text is in the mappings of the server's processes."""
    lines = []
    for pid in [server.process.pid, *children(server)]:
        with suppress(FileNotFoundError):
            lines += [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if text in line]
    return lines


def lease_of(etcd: EtcdProcess, key: str) -> str:
    body = json.dumps({"key": base64.b64encode(key.encode()).decode()}).encode()
    with urllib.request.urlopen(f"http://{etcd.address}/v3/kv/range", body, timeout=LIMIT_S) as response:
        (found,) = json.load(response)["kvs"]
    return found["lease"]


@pytest.mark.executed
def test_versions_come_and_go_while_lookups_go_on(etcd, models, tmp_path):
    registry = etcd.registry("come-and-go")
    first, second, patch = (published(models / name) for name in ("first", "second", "patch"))
    with serving(registry, tmp_path, ready=False, workers=2) as server:
        server.wait_for("published")
        assert server.said("published")[0]["versions"] == []
        assert registry.read().members == {}
        registry.publish(first)
        ready = server.wait_for("serving")
        server.address, server.metrics_address = ready["listen"], ready["metrics"]
        (held,) = wait_held(registry, server, first).held
        assert held.parts == {2: (0, 6500), 9: (0, 4100)}
        answers(server, first)
        with Asker(server.address) as asker:
            for version in (second, patch):
                registry.publish(version)
                wait_held(registry, server, *([first, second] if version is second else [first, second, patch]))
                before = asker.answers
                # Some at least, that all was exchanged beneath.
                eventually(lambda before=before: asker.answers > before + 5 or asker.error, "it goes on")
            assert described(server) == {first.version, second.version, patch.version}
            answers(server, first)
            answers(server, second, True)
            answers(server, patch, IDS % 10 == 0)
            seen = scrape(server.metrics_address)
            assert sum(value for name, value in seen.items() if name.startswith("engrampool_model_info")) == 3
            assert seen['engrampool_versions{state="held"}'] == 3
            rows = [seen[f'engrampool_table_rows{{layer="{layer}",model="small"}}'] for layer in (2, 9)]
            assert rows == [2 * 6500 + 650, 2 * 4100 + 410]
            # The loaders are gone; whatever the exporter and the registrar inherited, they have let go.
            assert len(children(server)) == 4
        assert asker.answers > 10

        registry.retire("small", patch.version)
        registry.retire("small", first.version)
        record = wait_held(registry, server, second)
        assert record.failed == {}
        server.wait_until(
            lambda lines: (
                sum(len(line.get("versions", ())) for line in lines if line["event"] == "version-withdrawn") == 2
            )
        )
        assert described(server) == {second.version}
        with RawPool(server.address, first.version) as pool:
            code, reason, _ = refusal(lambda: pool.lookup(pool.by_ids((2, [1]))))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "unknown-version")
        answers(server, second, True)
        assert {path.name.split("-")[2] for path in tmp_path.iterdir()} == {second.version[:16]}
        assert maps(server, second.version[:16])
        assert not maps(server, first.version[:16])
        seen = scrape(server.metrics_address)
        assert [name for name in seen if name.startswith("engrampool_model_info")] == [
            f'engrampool_model_info{{model="small",spec_digest="{SPEC.digest}",version="{second.version}"}}'
        ]
        assert seen['engrampool_table_rows{layer="2",model="small"}'] == 6500
        assert seen['engrampool_versions{state="published"}'] == seen['engrampool_versions{state="held"}'] == 1
        assert seen["engrampool_loaded_bytes_total"] == seen["engrampool_to_load_bytes"] > 2 * SPEC.nbytes

        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
        # Long before its lease would have run out.
        assert registry.read().members == {}


def test_what_fails_fails_alone_and_what_is_held_needs_no_registry(etcd, models, tmp_path):
    registry = etcd.registry("failures")
    first, second, mixed = (published(models / name) for name in ("first", "second", "mixed"))
    cache, rows = tmp_path / "published.json", tmp_path / "rows"
    rows.mkdir()
    # The registrar is then the one child that is neither worker nor loader.
    settings = {"metrics": "off", "registry_cache": cache}
    with serving(registry, rows, models / "first", **settings) as server:
        wait_held(registry, server, first)

        def failures() -> Mapping[str, str] | None:
            record = member(registry, server)
            return record and record.failed

        registry.publish(published(models / "second", at=models / "nowhere"))
        failed = eventually(failures, "a bad location is told")
        assert list(failed) == [second.version]
        assert f"{models / 'nowhere'} is no packed model" in failed[second.version]
        assert server.wait_for("version-failed")["error"] == failed[second.version]
        registry.retire("small", second.version)
        eventually(lambda: failures() == {}, "it is forgotten")

        # As long as somebody else seems to load the same segment, the loader waits.
        segment = rows / f"engrampool-{os.geteuid()}-{second.version[:16]}-2-0-6500"
        with segment.open("wb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            registry.publish(second)
            server.wait_for("waiting")
            (loader,) = [
                pid for pid, command in children(server).items() if "engrampool_server.processes.loader" in command
            ]
            os.kill(loader, signal.SIGKILL)
            failed = eventually(failures, "a loader that was killed is told")
            assert "SIGKILL" in failed[second.version]
            segment.unlink()
        answers(server, first)
        # A change has it tried again now.
        registry.publish(mixed)
        wait_held(registry, server, first, second, mixed)
        answers(server, second, True)

        key = f"/failures/servers/{server.address}"
        before = lease_of(etcd, key)
        (registrar,) = children(server).keys() - set(server.worker_pids().values())
        os.kill(registrar, signal.SIGKILL)
        eventually(lambda: lease_of(etcd, key) != before, "the next one registers anew")
        wait_held(registry, server, first, second, mixed)
        server.wait_until(
            lambda lines: any((x["event"], x.get("worker")) == ("worker-died", "registrar") for x in lines)
        )

        etcd.stop()
        answers(server, first)
        server.process.kill()
        server.process.wait(LIMIT_S)
    # Models that were given wait for no registry, and leave what they know nothing of where it lies.
    with serving(registry, rows, models / "first", metrics="off") as server:
        answers(server, first)
        assert server.said("published") == server.said("freed") == []
    with serving(registry, rows, **settings) as server:
        assert set(server.said("registry-cache")[0]["versions"]) == {second.version, mixed.version}
        # Of each version by its loader and then by the supervisor; nobody took the other one for a leftover.
        assert len(server.said("adopted")) == 8
        assert {Path(line["path"]).name.split("-")[2] for line in server.said("freed")} == {first.version[:16]}
        answers(server, second, True)
        etcd.start()
        wait_held(registry, server, second, mixed)
        assert server.said("version-withdrawn") == []
