"""Servers that die, stop and change while a client depends on them: real processes, real signals."""

import os
import signal
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from engrampool_client import Client, PoolError, UnavailableError, UnknownVersionError
from engrampool_client.testing import serve_process
from engrampool_proto.builders import blueprint
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S, PATIENCE, eventually, lasting_address
from small_model import CONFIG, TOKENIZER, small_spec, write_model

TOKENS = np.arange(6000, dtype=np.int32)


@pytest.fixture(scope="module")
def spec():
    return small_spec()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, spec):
    return write_model(tmp_path_factory.mktemp("models") / "small", spec)


def test_a_killed_server_fails_steps_at_once_and_comes_back(packed, spec):
    listen = lasting_address()  # the second server takes it over
    with (
        serve_process(packed, listen=listen) as first,
        Client(listen, timeout_s=LIMIT_S, connect_timeout_s=LIMIT_S) as client,
    ):
        steps = [client.prefetch(TOKENS) for _ in range(8)]  # twice as many as are worked on at once
        steps[0].rows(1)
        # Stopped first: however late this is, one step is asked for that nothing of is on its way already.
        for pid in [first.process.pid, *first.worker_pids().values()]:
            os.kill(pid, signal.SIGSTOP)
        steps.append(client.prefetch(TOKENS))
        first.process.kill()  # and its workers with it
        first.process.wait()
        outcomes = []
        for step in steps:
            try:
                step.wait()
            except UnavailableError as error:
                outcomes.append(error)
        assert outcomes
        with pytest.raises(UnavailableError):
            client.lookup(TOKENS)
        with serve_process(packed, listen=listen):
            # The channel reconnects by itself, after gRPC's backoff; each call until then fails at once.
            def answered():
                try:
                    return client.lookup(TOKENS[:50])
                except UnavailableError:
                    return None

            rows = eventually(answered, "the channel is connected again")
            ids = spec.hash(TokenBatch.of(TOKENS[:50]))
            assert all(np.array_equal(rows[n], synthetic_rows(spec.table(n), ids[n])) for n in (1, 14))


def test_a_frozen_server_costs_the_deadline_and_no_more(packed):
    with serve_process(packed) as server, Client(server.address, timeout_s=0.5, connect_timeout_s=LIMIT_S) as client:
        with server.frozen():
            step = client.prefetch([1, 2, 3])
            with pytest.raises(PoolError, match="DEADLINE_EXCEEDED"):
                step.rows(1)
        assert client.lookup([1], timeout_s=LIMIT_S)[1].shape == (1, 24, 264)


def test_another_version_on_the_same_address_is_not_mixed_in(tmp_path, packed):
    changed = blueprint({**CONFIG, "engram_pad_token_id": 3}, TOKENIZER).spec
    other = write_model(tmp_path / "other", changed)
    with serve_process(packed, listen=lasting_address()) as first:
        client = Client(first.address, timeout_s=LIMIT_S, connect_timeout_s=LIMIT_S)
    with client, serve_process(other, listen=first.address):
        with pytest.raises((UnknownVersionError, UnavailableError)) as caught:
            client.lookup([1])
        if caught.type is UnavailableError:  # the first try met the closed connection; the next finds the new server
            with pytest.raises(UnknownVersionError, match=f"version {client.version} of .* is not here; held: "):
                Client(first.address, version=client.version)


@pytest.mark.parametrize("lane", ["off", "auto"])
def test_killed_workers_fail_no_lookup(packed, spec, lane):
    """Those in flight on a worker are asked again, of the other or of its successor."""
    stop = threading.Event()
    failures: list[BaseException] = []
    answered = [0, 0, 0]
    counts = (1500, 40, 300)  # streams, single answers, short streams

    def look_up(at: int, client: Client) -> None:
        tokens = TOKENS[: counts[at]]
        ids = spec.hash(TokenBatch.of(tokens))
        wanted = {layer: synthetic_rows(spec.table(layer), ids[layer]) for layer in ids}
        out = {1: np.empty(wanted[1].shape, np.uint8)}
        try:
            while not stop.is_set():
                out[1][:] = 0
                rows = client.lookup(tokens, out=out) if at != 2 else client.prefetch(tokens, out=out)
                for layer in (1, 14):
                    found = rows[layer] if isinstance(rows, dict) else rows.rows(layer)
                    assert np.array_equal(found, wanted[layer])
                answered[at] += 1
                stop.wait(0.01)  # for those that start anew to have a processor
        except BaseException as error:
            failures.append(error)

    with ExitStack() as stack:
        server = stack.enter_context(serve_process(packed, workers=2))
        clients = [stack.enter_context(Client(server.address, **PATIENCE, direct=lane)) for _ in counts]
        threads = [threading.Thread(target=look_up, args=one) for one in enumerate(clients)]
        for thread in threads:
            thread.start()
        try:
            for turn in range(4):
                seen = list(answered)
                os.kill(server.worker_pids()[turn % 2], signal.SIGKILL)
                eventually(
                    lambda seen=seen: failures or all(now > then for now, then in zip(answered, seen, strict=True)),
                    "every client is answered after a worker was killed",
                )
                started = 3 + turn
                server.wait_until(lambda lines, n=started: sum(x["event"] == "worker-ready" for x in lines) >= n)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not failures
