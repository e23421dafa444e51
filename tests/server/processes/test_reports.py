"""The pipe between a child and the supervisor: neither waits for the other, and no piece of a line is taken for one."""

import json
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.registry.etcd import Published
from engrampool_server.processes import reports as module
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.processes.reports import GarbledError, Report, Reporter, ReportReader

PUBLISHED = [Published("m", f"v{number}", "/models/ä", None, "d", {1: 10}) for number in range(2000)]
KNOWN = PoolView(
    {("m", one.version): one for one in PUBLISHED}, {("m", one.version): {"7": 0} for one in PUBLISHED}, {"m": "v1"}
)


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    yield ReportReader(reader), Reporter(-1, writer, 1.0)
    os.close(reader)
    os.close(writer)


def taken(lines: ReportReader) -> list[Report]:
    """What came of all that is in the pipe."""
    found = []
    while True:
        try:
            found += [Report.of(line) for line in lines.read()]
        except BlockingIOError:
            return found


def test_what_is_said_arrives(pipe):
    lines, reporter = pipe
    reporter.beat()
    reporter.loaded(3, 7)
    reporter.known(PoolView({("m", "v0"): PUBLISHED[0]}, {("m", "v0"): {"7": 0}}, {"m": "v0"}))
    reporter.failed("grün")
    reporter.ready()
    assert taken(lines) == [
        Report(),
        Report(loaded=(3, 7)),
        Report(known=PoolView({("m", "v0"): PUBLISHED[0]}, {("m", "v0"): {"7": 0}}, {"m": "v0"})),
        Report(failed="grün"),
        Report(ready=True),
    ]
    assert not reporter.behind_bytes


def test_a_child_whose_reader_stands_still_goes_on_and_loses_nothing_that_matters(pipe):
    """Longer than the pipe is what is published: a part of it is in the pipe, and what follows must not mix with it."""
    lines, reporter = pipe
    reporter.known(KNOWN)
    assert reporter.behind_bytes
    for number in range(20_000):
        reporter.beat()
        reporter.loaded(number, 20_000)
    reporter.ready()
    reporter.failed("first")
    reporter.failed("last")
    assert reporter.behind_bytes < 1 << 20
    said = taken(lines)
    while reporter.behind_bytes:
        reporter.beat()
        said += taken(lines)
    assert [report for report in said if report != Report()] == [
        Report(known=KNOWN),
        Report(loaded=(19_999, 20_000)),
        Report(ready=True),
        Report(failed="last"),
    ]


@given(st.data())
def test_no_part_of_a_line_is_a_line(data):
    raw = json.dumps({"known": PoolView({("m", "v0"): PUBLISHED[0]}).to_json()}).encode()
    whole = data.draw(st.sampled_from([b'{"ready": true}', b'{"failed": "x"}', b'{"loaded": 12, "of": 34}', raw]))
    cut = data.draw(st.integers(1, len(whole) - 1))
    following = data.draw(st.sampled_from([b"", b'{"ready": true}', whole, whole[cut:-1]]))
    with pytest.raises(GarbledError):
        Report.of(whole[:cut] + following)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{\0}\0",
        b"\x00",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"ready": 1}',
        b'{"ready": true, "failed": "x"}',
        b'{"failed": null}',
        b'{"loaded": 1}',
        b'{"loaded": -1, "of": 2}',
        b'{"loaded": 1' + b"0" * 400 + b', "of": 2}',
        b'{"loaded": 1, "of": 1' + b"0" * 5000 + b"}",
        b'{"known": 7}',
        b'{"known": {}}',
        b'{"known": {"published": [["m"]]}}',
        b'{"known": {"published": [["m", "v", {}]]}}',
        b'{"known": {"published": [["m", "v", "{}", {"7": 0}]]}}',
        b'{"known": {"published": [7]}}',
        b'{"known": {"published": [], "active": ["m"]}}',
        b'{"known": {"published": []}, "ready": true}',
        b"[" * 100_000,
    ],
)
def test_what_no_child_says_is_refused(line):
    with pytest.raises(GarbledError):
        Report.of(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_report_or_refused(line):
    with suppress(GarbledError):
        assert isinstance(Report.of(line), Report)


def test_a_line_without_an_end_takes_no_memory_without_an_end(pipe, monkeypatch):
    lines, reporter = pipe
    monkeypatch.setattr(module, "LONGEST_BYTES", 100_000)
    for _ in range(40):
        os.write(reporter.report, b" " * 50_000)
        assert lines.read() == []
        assert len(lines.unread) <= 150_000
    # What would be a report, had it come with nothing before it but the spaces.
    reporter.ready()
    (line,) = lines.read()
    with pytest.raises(GarbledError):
        Report.of(line)
    reporter.ready()
    assert taken(lines) == [Report(ready=True)]
