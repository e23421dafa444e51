"""Random and mutated frames: no crash, no byte outside the tables, and the next caller is answered."""

import lane_fuzz
from direct_callers import be_patient


def test_whatever_is_sent_only_rows_and_refusals_come_back(monkeypatch):
    be_patient(monkeypatch)
    target = lane_fuzz.Target()
    came = lane_fuzz.fuzz(target, 1, 5_000)
    target.close()
    assert min(came["answers"], came["rows"]) > 500
    assert came["refusals"] > 50
