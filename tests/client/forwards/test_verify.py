"""Comparing with the engine's own, settings of the environment, and what Prometheus sees."""

import urllib.request

import numpy as np
import pytest

from engrampool_client import Client, FingerprintError
from engrampool_client.integrations.forwards import metrics
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX, EngineSettings
from engrampool_client.integrations.forwards.verify import Verifier
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows


def ints(*values):
    return np.array(values, np.int64)


CHUNKS = ints(1, 0), ints(2, 0), ints(3, 2)


@pytest.fixture
def verifier(spec):
    histories = Histories(2, 20, 3)
    histories.add(0, [5, 6, 7])
    histories.add(1, [1, 2, 3, 4, 5])
    made = Verifier(
        spec,
        slice(6, 12),
        histories,
        EngineCounts(spec.layers),
        lambda layer, ids: synthetic_rows(spec.table(layer), ids.astype(np.uint64)),
    )
    made.histories, made.counted = histories, made._counts
    return made


def test_a_row_id_that_differs_is_an_error_that_names_its_token(spec, verifier):
    ids = spec.hash(TokenBatch.of(*verifier.histories.batch(*CHUNKS)), spec.layers)
    verifier.ids(*CHUNKS, ids)
    assert (verifier.counted.verified, verifier.counted.differences) == (5, 0)
    ids[14][3, 20] += 1
    with pytest.raises(
        FingerprintError,
        match=r"layer 14: 1 of 5 tokens, the first token 3 \(request 0, position 0\), head 20: row \d+ here, \d+ b",
    ):
        verifier.ids(*CHUNKS, ids)
    assert (verifier.counted.verified, verifier.counted.differences) == (10, 1)


def test_a_row_that_differs_from_the_table_is_an_error_that_names_its_token(spec, verifier):
    ids = spec.hash(TokenBatch.of(*verifier.histories.batch(*CHUNKS)), [1])[1][:, 6:12]
    memory = np.zeros((9, 6, 264), np.uint8)
    at, valid = ints(8, 3, 4, 5, 0), np.array([True, True, True, True, False])
    memory[at] = synthetic_rows(spec.table(1), ids.reshape(-1).astype(np.uint64)).reshape(5, 6, 264)
    memory[0] = 0  # of the token that has none
    verifier.rows(1, CHUNKS, valid, memory, at)
    assert (verifier.counted.verified, verifier.counted.differences) == (4, 0)
    memory[4, 2, 100] ^= 1
    row = ids[2, 2]
    with pytest.raises(
        FingerprintError, match=rf"row {row} of token 2 \(request 1, position 4\) is not that of the local"
    ):
        verifier.rows(1, CHUNKS, valid, memory, at)
    assert verifier.counted.differences == 1


def test_settings_are_variables_and_a_wrong_one_is_named():
    assert EngineSettings.of({}) == EngineSettings()
    found = EngineSettings.of(
        {f"{ENGINE_PREFIX}VERIFY": "1", f"{ENGINE_PREFIX}METRICS_PORT": "9400", f"{ENGINE_PREFIX}AHEAD_TOKENS": "0"}
    )
    assert found == EngineSettings(verify=True, metrics_port=9400, ahead_tokens=0)
    for name, value, said in (
        ("VERIFIES", "1", "no such setting; ENGRAMPOOL_ENGINE_VERIFY was meant"),
        ("VERIFY", "yes", "'yes' is not allowed: it must be true or false"),
        ("METRICS_PORT", "0", "'0' is not allowed: a port is 1 .. 65535"),
        ("AHEAD_TOKENS", "many", "'many' is not allowed"),
    ):
        with pytest.raises(ValueError, match=rf"{ENGINE_PREFIX}{name}.*{said}"):
            EngineSettings.of({ENGINE_PREFIX + name: value})


def test_a_workers_port_shows_what_the_adapter_and_the_client_count(server, spec):
    counts = EngineCounts(spec.layers)
    counts.steps, counts.masked[14], counts.early["served"] = 3, 7, 11
    counts.waited(1, 0.0003)
    with Client(server) as client:
        serving = metrics.serve(0, client, counts)
        try:
            url = f"http://127.0.0.1:{serving.server_port}/metrics"
            found = urllib.request.urlopen(url, timeout=60).read().decode()
        finally:
            serving.shutdown()
            serving.server_close()
    model = f'model="{spec.name}"'
    for line in (
        f"engrampool_engine_steps_total{{{model}}} 3.0",
        f'engrampool_engine_masked_tokens_total{{layer="14",{model}}} 7.0',
        f'engrampool_engine_early_tokens_total{{fate="served",{model}}} 11.0',
        f'engrampool_engine_wait_seconds_bucket{{layer="1",le="0.0005",{model}}} 1.0',
        f'engrampool_engine_wait_seconds_bucket{{layer="1",le="0.00025",{model}}} 0.0',
        f'engrampool_client_steps_total{{{model},outcome="ok"}} 0.0',
    ):
        assert line in found, found
