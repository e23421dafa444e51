"""`engrampool doctor`: its verdicts on made-up measurements, its streams, and whole runs against a real server."""

import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from click import UsageError
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import BatchError, Client, FingerprintError, RecordError, SpecError, UnavailableError
from engrampool_client.doctor import diagnosis, replay
from engrampool_client.doctor.cache_sizes import CacheSize
from engrampool_client.doctor.command import doctor, print_report
from engrampool_client.doctor.diagnosis import Phase, Report, Trial, Tried, Verdict, judge, split, trials
from engrampool_client.doctor.record import Recorder, Recording
from engrampool_client.doctor.replay import (
    Clock,
    Forward,
    Play,
    Played,
    Text,
    phases_of_recording,
    phases_of_text,
    play,
)
from engrampool_client.lookup import delivery
from engrampool_proto.cli import main
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.wire import ServerTimes
from server_fixtures import eventually, serve_thread

pytestmark = pytest.mark.usefixtures("patient")
VOCAB = 129280
LAYERS = 20


def text_of(count, seed=0) -> np.ndarray:
    """Few words, so that n-grams come again."""
    return (np.random.default_rng(seed).zipf(1.7, count) % VOCAB).astype(np.int32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, text_of(1200))
    return path


@pytest.fixture
def model_clock(monkeypatch):
    """Time goes on a little with each look at it, and by as much as a layer takes once all is there that was asked for.

    So no lookup takes as long as a layer, however slow this machine is.
    """
    looks, slept, started, start = itertools.count(), [0.0], [], Forward.start

    def now() -> float:
        return 1e-6 * next(looks) + slept[0]

    def sleep(seconds: float) -> None:
        eventually(lambda: all(step.done() for step in started), "rows are there")
        started.clear()
        slept[0] += seconds

    def noted(forward: Forward, *how):
        started.append(start(forward, *how))
        return started[-1]

    monkeypatch.setattr(Forward, "start", noted)
    real = {name: getattr(time, name) for name in ("thread_time", "process_time")}
    monkeypatch.setattr(replay, "time", SimpleNamespace(perf_counter=now, sleep=sleep, **real))
    monkeypatch.setattr(delivery, "time", SimpleNamespace(perf_counter=now, monotonic=time.monotonic))
    round_trip = diagnosis.round_trip

    def by_the_real_one(client: Client) -> float | None:  # as the server's time is taken from it
        with monkeypatch.context() as patch:
            patch.setattr(delivery, "time", time)
            return round_trip(client)

    monkeypatch.setattr(diagnosis, "round_trip", by_the_real_one)


@pytest.fixture
def whole_simulation(monkeypatch):
    """Caches are simulated to the end of what they are asked for, however slow this machine is."""
    simulate = diagnosis.simulate
    monkeypatch.setattr(diagnosis, "simulate", lambda spec, heads, phases, _: simulate(spec, heads, phases, 600))


@pytest.fixture
def patient_ms(tmp_path, model_clock):
    """Layer 0 takes longer than any lookup, the others no time."""
    path = tmp_path / "patient.json"
    times = [400.0, *[0.0] * (LAYERS - 1)]
    path.write_text(json.dumps({"prefill": times, "decode": times}))
    return path


def run(*arguments):
    result = CliRunner().invoke(doctor, list(map(str, arguments)), standalone_mode=False, catch_exceptions=False)
    return result.return_value, result.output


def forward(margins, masked=None, elapsed_s=0.004, times=(100, 200, 1000)) -> Played:
    given_times = None if times is None else ServerTimes(*times)
    return Played(64, 0.0001, margins, masked or dict.fromkeys(margins, 0), elapsed_s, given_times)


# --- judging


def test_a_verdict_is_that_of_the_percentile():
    margins = [0.005] * 98 + [-0.001, -0.002]
    played = Play([forward({2: margin, 9: 0.001}) for margin in margins], {2: 0.01, 9: 0.05})
    at = {q: judge(played, q) for q in (50, 98, 99, 100)}
    assert [verdict.margin_s for verdict, _ in at.values()] == [0.005, 0.005, -0.001, -0.002]
    assert [verdict.hidden for verdict, _ in at.values()] == [True, True, False, False]
    assert at[99][0] == Verdict(2, 0.01, 0.005, -0.001, 0)
    assert at[99][1] == Verdict(9, 0.05, 0.001, 0.001, 0)


def test_rows_just_in_time_are_hidden_and_masked_ones_never():
    played = Play([forward({2: 0.0})], {2: 0.0})
    assert judge(played, 99)[0].hidden
    played.forwards.append(forward({2: 0.01}, {2: 3}))
    (verdict,) = judge(played, 50)
    assert (verdict.hidden, verdict.masked_tokens) == (False, 3)


def test_a_layer_is_judged_by_the_forwards_that_asked_for_it():
    played = Play([forward({2: 0.1}), forward({9: -0.1})], {2: 0.0, 9: 0.0})
    assert [(one.layer, one.hidden) for one in judge(played, 99)] == [(2, True), (9, False)]


def test_the_parts_of_a_lookup_add_up_and_are_of_those_that_asked_the_server():
    cached = forward({2: 0.1}, elapsed_s=0.5, times=None)
    failed = forward({2: 0.1}, elapsed_s=None, times=None)
    parts = split(Play([forward({2: 0.1}), cached, failed], {2: 0.0}), 99)
    medians = {name: seconds for name, (seconds, _) in parts.items()}
    assert medians.pop("whole") == pytest.approx((0.5 + 0.004) / 2)
    assert medians.pop("call of prefetch") == pytest.approx(0.0001)
    expected = {"server queue": 1e-4, "server gather": 2e-4, "server rest": 7e-4, "wire and client": 3e-3}
    assert medians == pytest.approx(expected)
    assert sum(medians.values()) == pytest.approx(0.004)
    assert set(split(Play([cached], {2: 0.0}), 99)) == {"whole", "call of prefetch"}


# --- streams


def test_prefill_is_the_text_in_chunks_with_the_look_back_of_each_sequence():
    sequences = [np.arange(10, 17, dtype=np.int32), np.arange(0, dtype=np.int32), np.arange(20, 32, dtype=np.int32)]
    phases = phases_of_text(Text.of(sequences), 3, 5, None)
    assert list(phases) == ["prefill"]
    chunks = [one.asked for one in phases["prefill"]]
    assert [chunk.tokens.tolist() for chunk in chunks] == [
        [10, 11, 12, 13, 14],
        [15, 16, 20, 21, 22],
        [23, 24, 25, 26, 27],
    ]
    assert [chunk.query_start_loc.tolist() for chunk in chunks] == [[0, 5], [0, 2, 5], [0, 5]]
    assert [chunk.lookback.tolist() for chunk in chunks] == [
        [[-1, -1, -1]],
        [[14, 13, 12], [-1, -1, -1]],
        [[22, 21, 20]],
    ]
    with pytest.raises(IndexError):
        phases["prefill"][3]
    assert [one.num_tokens for one in phases["prefill"][1:]] == [5, 5]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_any_split_of_a_text_has_the_rows_of_its_sequences(spec, lengths, chunk, batch):
    """Every forward's rows are those that its tokens have in their sequence, and no token is asked for twice."""
    rng = np.random.default_rng(sum(lengths))
    sequences = [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]
    whole = [row for one in sequences for row in spec.hash(TokenBatch.of(one), [14])[14].tolist()]
    text = Text.of(sequences)
    try:
        phases = phases_of_text(text, spec.lookback, chunk, batch)
    except BatchError:
        assert sum(lengths) < max(2, 2 * batch)
        return
    seen = []
    for one in phases["prefill"]:
        seen += spec.hash(one.asked, [14])[14].tolist()
    half = len(whole) // 2
    assert seen == whole[: len(seen)]
    assert half - chunk < len(seen) <= half
    steps = [spec.hash(one.asked, [14])[14].tolist() for one in phases["decode"]]
    assert len(steps) == (len(whole) - half) // batch
    for sequence in range(batch):
        first = half + sequence * len(steps)
        assert [step[sequence] for step in steps] == whole[first : first + len(steps)]


def test_too_few_tokens_are_said():
    with pytest.raises(BatchError, match="3 tokens are too few for a forward of decode"):
        phases_of_text(Text.of([np.arange(3, dtype=np.int32)]), 3, None, 4)
    with pytest.raises(BatchError, match="0 tokens are too few for a forward of prefill"):
        phases_of_text(Text.of([]), 3, 4, None)


def recorded(path, spec, *batches, heads=None) -> Recording:
    recorder = Recorder(path, spec, "v")
    for batch in batches:
        recorder.tokens(TokenBatch.of(batch), spec.layers)
    recorder.close()
    return Recording(path)


def test_a_recorded_lookup_is_of_the_phase_that_it_is_nearer_to(spec, tmp_path):
    clocks = {"prefill": Clock((1.0,), 400, True), "decode": Clock((1.0,), 4, False)}
    sizes = [4, 400, 39, 41, 0, 1, 800]
    recording = recorded(tmp_path / "stream", spec, *map(text_of, sizes))
    phases = phases_of_recording(recording, spec, None, clocks)
    assert {name: [one.num_tokens for one in of] for name, of in phases.items()} == {
        "prefill": [400, 41, 800],
        "decode": [4, 39, 1],
    }
    assert np.array_equal(phases["decode"][0].asked[14], spec.hash(TokenBatch.of(text_of(4)))[14])
    alone = phases_of_recording(recording, spec, (2, 5), {"decode": clocks["decode"]})
    assert [one.num_tokens for one in alone["decode"]] == [4, 400, 39, 41, 1, 800]
    assert np.array_equal(alone["decode"][0].asked[1], spec.hash(TokenBatch.of(text_of(4)))[1][:, 2:5])


def test_a_clock_gives_each_layer_its_start():
    assert Clock((0.1, 0.2, 0.3), 10, True).starts(5) == pytest.approx([0, 0.05, 0.15, 0.3])
    assert Clock((0.1, 0.2, 0.3), 10, False).starts(5) == pytest.approx([0, 0.1, 0.3, 0.6])
    assert Clock.even(0.4, 4, 10, False).starts(10) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


# --- playing


def test_a_play_has_the_margins_of_a_model_that_waits(server, model_clock):
    with Client(server) as client:
        forwards = [Forward(TokenBatch.of(text_of(30, seed))) for seed in range(5)]
        clock = Clock((0.3, *[0.0] * 12, 0.2, *[0.0] * 6), 30, False)
        patient = play(client, forwards, clock, 0.0)
        assert len(patient.forwards) == 3  # three at least, and no time for more
        assert patient.starts_s == {1: pytest.approx(0.3), 14: pytest.approx(0.5)}
        for one in patient.forwards:
            assert 0 < one.margin_s[1] < 0.3
            assert 0.2 < one.margin_s[14] < 0.5
            assert one.masked == {1: 0, 14: 0}
            assert one.times.total_us > 0
            assert one.elapsed_s > 0
        assert patient.bytes["wire"] == 3 * 30 * 2 * 24 * 264
        assert patient.cpu_s > 0

        hasty = play(client, forwards, Clock((0.0,) * LAYERS, 30, False), 60.0)
        assert len(hasty.forwards) == 5
        assert all(one.margin_s[1] < 0 for one in hasty.forwards)
        # Layer 14 starts when layer 1 has its rows: what layer 1 waited for is not counted twice.
        assert all(one.margin_s[1] + one.margin_s[14] > -2 * one.elapsed_s - 0.1 for one in hasty.forwards)


def test_rows_prefetched_ahead_are_there_at_once(server, model_clock):
    with Client(server) as client:
        forwards = [Forward(TokenBatch.of(text_of(30, seed))) for seed in range(4)]
        played = play(client, forwards, Clock((0.0,) * 14 + (0.3,) + (0.0,) * 5, 30, False), 60.0, ahead=True)
        assert (len(played.forwards), played.lookups) == (3, 4)
        assert all(one.margin_s[1] > 0.1 for one in played.forwards)
        eventually(lambda: client.stats.in_flight == 0, "all have ended")


def test_what_is_left_prefetched_at_the_end_is_cancelled(server):
    with Client(server) as client:
        forwards = [Forward(TokenBatch.of(text_of(30, seed))) for seed in range(9)]
        assert len(play(client, forwards, Clock((0.0,) * LAYERS, 30, False), 0.0, ahead=True).forwards) == 3
        assert client.stats.begun == 5
        eventually(lambda: client.stats.in_flight == 0, "all have ended")


def test_masked_tokens_are_counted_and_expose_the_layer(packed):
    with serve_thread(packed) as address:
        client = Client(address, on_failure="mask", retry_s=0, breaker_failures=1, attach="off", direct="off")
    with client:
        played = play(client, [Forward(TokenBatch.of(text_of(5)))], Clock((0.01,) * LAYERS, 5, False), 0.0)
    assert played.forwards[0].masked == {1: 5, 14: 5}
    assert played.forwards[0].elapsed_s is None
    assert not any(verdict.hidden for verdict in judge(played, 50))


# --- whole runs


def test_generous_layers_are_hidden(server, tokens, patient_ms, whole_simulation):
    sizes = ("--prefill-tokens", 100, "--decode-batch", 8)
    code, output = run(
        *("--server", server, "--tokens", tokens, "--layer-ms", patient_ms, *sizes, "--seconds", 0.5, "--json")
    )
    report = json.loads(output)
    assert (code, report["hidden"]) == (0, True)
    prefill, decode = report["phases"]
    assert (prefill["name"], prefill["num_tokens"], prefill["forwards"]) == ("prefill", 100, 3)
    assert (decode["name"], decode["num_tokens"], decode["forwards"]) == ("decode", 8, 3)
    for phase in report["phases"]:
        assert [verdict["layer"] for verdict in phase["verdicts"]] == [1, 14]
        assert all(verdict["hidden"] and verdict["margin_s"] > 0 for verdict in phase["verdicts"])
        assert phase["forward_s"] == pytest.approx(0.4)
        assert phase["split"]["server queue"][0] >= 0
    assert report["lane"] in ("direct", "attached")
    assert report["round_trip_s"] is None or report["round_trip_s"] > 0
    assert report["cache"][0]["saved"].keys() == {"prefill", "decode"}


def test_layers_without_any_time_are_exposed_and_what_was_tried_is_said(server, tokens, whole_simulation):
    code, output = run(
        *("--server", server, "--tokens", tokens, "--layers", LAYERS, "--decode-batch", 8, "--decode-ms", 0),
        *("--direct", "off", "--attach", "off", "--no-dedupe", "--seconds", 0.5),
    )
    assert code == 3
    assert "decode: exposed; hidden with: " in output
    assert "exposed by" in output
    assert "lookups go over: grpc" in output
    for name in ('direct="auto"', "dedupe=True", "cache_bytes="):
        assert f"decode with {name}" in output


def test_a_recording_is_replayed_with_the_same_settings(server, tmp_path, patient_ms):
    path = tmp_path / "stream"
    with Client(server, record=path, heads=(0, 8)) as client:
        for seed in range(8):
            client.lookup(text_of(6, seed))
    code, output = run(
        *("--server", server, "--record", path, "--layer-ms", patient_ms, "--decode-batch", 6, "--prefill-tokens", 999),
        *("--heads", "0:8", "--seconds", 0.5, "--cache-bytes", 1 << 20, "--json"),
    )
    (phase,) = json.loads(output)["phases"]
    assert (code, phase["num_tokens"]) == (0, 6)
    assert sum(phase["bytes"].values()) == pytest.approx(6 * 2 * 8 * 264)


def test_a_tier_that_is_slower_than_the_layers_exposes_them_and_the_report_says_that_it_is_emulated(
    packed, tokens, tmp_path
):
    slow = tmp_path / "slow.json"
    slow.write_text('{"latency_s": 0.05, "bandwidth_gb_per_s": 10}')
    shown = ("--layers", LAYERS, "--decode-ms", 20, "--decode-batch", 8, "--seconds", 0.5)
    with serve_thread(packed, memory=f"file:{tmp_path}") as server:
        code, output = run("--server", server, "--tokens", tokens, *shown, "--emulate", slow)
        assert code == 3
        assert "emulated, not measured on such hardware: slow: 50000 us a group of a request, 10 GB/s" in output
        _, output = run("--server", server, "--tokens", tokens, *shown, "--emulate", slow, "--json")
    found = json.loads(output)
    assert found["lane"] == "attached"
    assert found["emulated"].startswith("slow: ")
    # Layer 1 begins a twentieth of 20 ms after the rows were asked for, and has them 50 ms after that.
    assert found["phases"][0]["verdicts"][0]["p50_s"] < -0.048


def test_layer_times_of_a_file(server, tokens, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"decode": [0.5] * 13 + [2.5] * 7}))
    _, output = run(
        *("--server", server, "--tokens", tokens, "--layer-ms", path, "--decode-batch", 8, "--seconds", 0.2, "--json")
    )
    (phase,) = json.loads(output)["phases"]
    assert [one["start_s"] for one in phase["verdicts"]] == pytest.approx([0.0005, 0.009])


def test_bad_input_is_one_error(server, other_packed, tokens, spec, tmp_path):
    def array(name, values):
        np.save(tmp_path / name, values)
        return tmp_path / name

    layers = ("--layers", LAYERS, "--decode-ms", 1, "--decode-batch", 4)
    with serve_thread(other_packed) as other, Client(other, record=tmp_path / "other") as client:
        client.lookup([1, 2, 3])
        other_digest = client.spec.digest
    empty = recorded(tmp_path / "empty", spec)
    assert list(empty) == []
    garbage = tmp_path / "garbage.json"
    garbage.write_text('{"decode": [1, "two"]}')
    cases = [
        (BatchError, "absent.npy cannot be read: No such file", ("--tokens", tmp_path / "absent.npy", *layers)),
        (
            BatchError,
            r"a\.npy cannot be made int32: they are float64",
            ("--tokens", array("a.npy", np.ones(9)), *layers),
        ),
        (
            BatchError,
            r"b\.npy: tokens\[1\] is 129280; this model's token ids are 0 \.\. 129279",
            ("--tokens", array("b.npy", np.array([1, VOCAB], np.int32)), *layers),
        ),
        (BatchError, "too few for a forward of decode", ("--tokens", array("c.npy", np.zeros(3, np.int32)), *layers)),
        (RecordError, "absent cannot be read: No such file", ("--record", tmp_path / "absent", *layers)),
        (RecordError, "is no recording of row ids", ("--record", tokens, *layers)),
        (
            RecordError,
            rf"specification {other_digest}; the server holds .* specification {spec.digest}",
            ("--record", tmp_path / "other", *layers),
        ),
        (RecordError, "empty holds no lookup", ("--record", tmp_path / "empty", *layers)),
        (
            SpecError,
            "has rows for layer 14; decode has 14 layers",
            ("--tokens", tokens, "--layers", 14, "--decode-ms", 1),
        ),
        (BatchError, "must be JSON like", ("--tokens", tokens, "--layer-ms", garbage)),
        (BatchError, "cannot be read", ("--tokens", tokens, "--layer-ms", tmp_path / "absent")),
    ]
    for kind, text, arguments in cases:
        with pytest.raises(kind, match=text):
            run("--server", server, *arguments)
    with pytest.raises(UsageError, match="--emulate is of attached memory"):
        run("--server", server, "--tokens", tokens, *layers, "--emulate", "cxl-direct", "--attach", "off")
    with pytest.raises(SpecError, match="emulate needs memory that is attached"):
        run("--server", server, "--tokens", tokens, *layers, "--emulate", "cxl-direct")
    with pytest.raises(UnavailableError, match="no server at"):
        run("--server", "127.0.0.1:1", "--tokens", tokens, *layers, "--timeout-s", 0.2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--layers", "9", "--decode-ms", "1"), "give either --tokens or --record"),
        (("--tokens", "a", "--record", "b", "--layers", "9", "--decode-ms", "1"), "give either --tokens or --record"),
        (("--tokens", "a", "--layers", "9"), "give --prefill-ms or --decode-ms or both"),
        (("--tokens", "a", "--decode-ms", "1"), "give --layers"),
        (("--tokens", "a", "--layer-ms", "f", "--layers", "9"), "leave out --layers"),
        (("--tokens", "a", "--layers", "9", "--decode-ms", "1", "--heads", "7"), "'7' is not A:B"),
        (("--tokens", "a", "--connections", "0"), "'0' is neither auto nor 1 or more"),
        (("--tokens", "a", "--connections", "some"), "'some' is neither auto nor 1 or more"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_read(arguments, text):
    result = CliRunner().invoke(doctor, ["--server", "127.0.0.1:1", *arguments])
    assert result.exit_code == 2
    assert text in result.output


def test_the_program_ends_with_the_verdicts_code(server, tokens, patient_ms, tmp_path, monkeypatch, capsys):
    words = ["doctor", "--server", server, "--tokens", str(tokens)]
    words += ["--decode-batch", "8", "--prefill-tokens", "100", "--seconds", "0.2", "--layer-ms"]
    hasty = tmp_path / "hasty.json"
    hasty.write_text(json.dumps({"decode": [0] * LAYERS}))
    for path, code in ((hasty, 3), (patient_ms, 0)):
        monkeypatch.setattr(sys, "argv", ["engrampool", *words, str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code, capsys.readouterr().err) == (code, "")
    words = [sys.executable, "-m", "engrampool_proto", *words]
    done = subprocess.run([*words, str(hasty)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    record = [word if word != "--tokens" else "--record" for word in words]
    done = subprocess.run([*record, str(hasty)], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "is no recording of row ids" in done.stderr


def test_a_trial_that_fails_takes_no_verdict_away(server, tokens, monkeypatch):
    def connect(**settings):
        if settings["direct"] == "auto":
            raise FingerprintError(["all"])
        return Client(**settings)

    monkeypatch.setattr(diagnosis, "Client", connect)
    code, output = run(
        *("--server", server, "--tokens", tokens, "--layers", LAYERS, "--decode-batch", 8, "--decode-ms", 0),
        *("--direct", "off", "--attach", "off", "--seconds", 0.2),
    )
    assert code == 3
    assert 'note: direct="auto" could not be tried for decode' in output


# --- the report


def phase_of(name, *margins, masked=0) -> Phase:
    verdicts = [Verdict(layer, 0.001, abs(margin), margin, masked) for layer, margin in enumerate(margins)]
    return Phase(name, 0, 500, 64, 0.012, verdicts, {"whole": (1e-3, 2e-3)}, 1e-3, {"wire": 75, "cache": 25}, True)


def test_it_says_of_each_server_how_it_is_reached_and_why_one_is_not_used(capsys, server):
    with Client([server, "127.0.0.1:1"], attach="off") as client:
        eventually(lambda: not client.status()["servers"][1]["why_unused"].startswith("it has not"), "it is looked for")
        status = client.status()
    print_report(Report("m", "v", status, 99.0, None, [phase_of("decode", 0.1)], [], [], []))
    output = capsys.readouterr().out
    assert f'\n  {server}: lane direct; not attached: the client was made with attach="off"\n' in output
    assert "\n  127.0.0.1:1: not used: no server at 127.0.0.1:1 was ready" in output


def report_of(phases, tried=(), cache=()) -> Report:
    status = {
        "target": "node:1",
        "lane": "direct",
        "servers": [],
        "why_not_compiled": None,
        "registry": None,
        "why_unusable": None,
    }
    return Report("m", "v", status, 99.0, 2e-4, list(phases), list(cache), list(tried), ["a note"])


def test_a_remedy_is_what_hid_every_layer(capsys):
    exposed = phase_of("decode", 0.0019, -0.0004)
    better = Tried(Trial("direct"), phase_of("decode", 0.002, -0.0001))
    good = Tried(Trial("cache_bytes=64"), phase_of("decode", 0.002, 0.0001))
    other = Tried(Trial("ahead"), phase_of("prefill", 0.002, 0.0001))
    report = report_of([exposed, phase_of("prefill", 0.1)], [better, good, other])
    assert not report.hidden
    assert report.remedies("decode") == ["cache_bytes=64"]
    print_report(report)
    output = capsys.readouterr().out
    assert "layer   0 at     1.00 ms: hidden, margin 1.90 ms at p99" in output
    assert "layer   1 at     1.00 ms: exposed by 0.40 ms at p99 (hidden, margin 0.40 ms at p50)" in output
    assert "by source: wire 75%, cache 25%" in output
    assert output.endswith("note: a note\ndecode: exposed; hidden with: cache_bytes=64\nprefill: hidden\n")
    plain = report.to_json()
    assert plain == json.loads(json.dumps(plain))
    assert [phase["remedies"] for phase in plain["phases"]] == [["cache_bytes=64"], ["ahead"]]
    assert [one["phase"]["hidden"] for one in plain["tried"]] == [False, True, True]
    assert [one["hidden"] for one in plain["phases"][0]["verdicts"]] == [True, False]


def test_without_a_remedy_it_says_so(capsys):
    sizes = [CacheSize(16 << 20, 0.02, {"decode": 0.02}, 5)]
    print_report(report_of([phase_of("decode", 0.1, masked=3)], cache=sizes))
    output = capsys.readouterr().out
    assert "decode: exposed; hidden with: none of those tried" in output
    assert "3 tokens went without their rows" in output
    assert "a cache does not pay on this traffic: none saves 10%" in output


@pytest.mark.parametrize(
    ("settings", "lane", "phase", "names"),
    [
        ({}, "direct", phase_of("decode", -1.0), ["cache_bytes=64"]),
        ({"cache_bytes": 64}, "direct", phase_of("decode", -1.0), []),
        ({}, "attached", phase_of("decode", -1.0), []),
        ({"attach": "off", "direct": "off"}, "grpc", phase_of("decode", -1.0), ["attach", "cache_bytes", "direct"]),
        ({"attach": "off", "direct": "off"}, "grpc", phase_of("decode", 1.0), ["cache_bytes"]),
        ({"dedupe": False}, "direct", phase_of("decode", -1.0), ["cache_bytes", "dedupe"]),
        ({}, "direct", phase_of("prefill", -1.0), ["prefetch(..., ahead"]),
    ],
)
def test_what_is_tried_is_what_promises_something(settings, lane, phase, names):
    sizes = [CacheSize(64, 0.5, {"decode": 0.5}, 0)]
    stream = [Forward({})] * 9
    chosen = trials({"target": "t", **settings}, phase, stream, sizes, lane=lane, attachable=True, direct=True)
    assert [trial.name.split("=")[0] for trial in chosen] == [name.split("=")[0] for name in names]
