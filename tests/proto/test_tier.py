"""Tiers: what presets say, what a file may say, and the same clock in Python and without it."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.kernels.tier import GROUP, LATENCY, LINK, RATE, TIER_WORDS, due_of, turn_of
from engrampool_proto.tiers.tier import Tier, TierError, preset_names


def words_of(tier, link):
    words = np.zeros(TIER_WORDS, np.int64)
    words[LATENCY], words[GROUP], words[RATE] = tier.latency_ns, tier.group_bytes, tier.bytes_per_s
    words[LINK] = link.ctypes.data
    return words


def test_every_preset_says_where_it_is_from_and_how_sure_it_is():
    assert preset_names() == (
        "far-numa",
        "cxl-direct",
        "cxl-switch",
        "rdma-100g",
        "rdma-400g",
        "tcp-25g",
        "tcp-100g",
    )
    for name in preset_names():
        tier = Tier.of(name)
        assert tier.name == name
        assert tier.sources.endswith(".")
        assert tier.sure.endswith(".")
        assert bool(tier.group_bytes) == (tier.kind == "memory")
        assert json.loads(json.dumps(tier.to_json()))["name"] == name


def test_a_file_says_a_tier(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"latency_s": 1e-6, "bandwidth_gb_per_s": 2}')
    tier = Tier.of(str(path))
    assert (tier.name, tier.latency_ns, tier.group_bytes, tier.bytes_per_s) == ("mine", 1000, 0, 2 * 10**9)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{}",
        '{"latency_s": 1}',
        '{"latency_s": 1, "bandwidth_gb_per_s": 1, "jitter": 0}',
        '{"latency_s": "1", "bandwidth_gb_per_s": 1}',
        '{"latency_s": true, "bandwidth_gb_per_s": 1}',
        '{"latency_s": NaN, "bandwidth_gb_per_s": 1}',
        '{"latency_s": 1e400, "bandwidth_gb_per_s": 1}',
        '{"latency_s": -1, "bandwidth_gb_per_s": 1}',
        '{"latency_s": 2, "bandwidth_gb_per_s": 1}',
        '{"latency_s": 0, "bandwidth_gb_per_s": 0}',
        '{"latency_s": 0, "bandwidth_gb_per_s": 1, "group_bytes": -1}',
        '{"latency_s": 0, "bandwidth_gb_per_s": 1, "kind": "tape"}',
    ],
)
def test_a_file_that_says_none_is_refused(tmp_path, said):
    path = tmp_path / "mine.json"
    path.write_text(said)
    with pytest.raises(TierError, match="tier"):
        Tier.of(str(path))


@pytest.mark.parametrize("name", ["", "cxl", "/nowhere/at/all.json", "a\0/b"])
def test_a_name_that_no_tier_has_is_refused(name):
    with pytest.raises(TierError, match="tier"):
        Tier.of(name)


tiers = st.builds(
    Tier,
    name=st.just("any"),
    latency_ns=st.integers(0, 10**9),
    group_bytes=st.integers(0, 1 << 20),
    bytes_per_s=st.integers(10**7, 10**14),
)


@given(tier=tiers, nbytes=st.integers(1, 1 << 30), begin=st.integers(1, 1 << 60))
def test_one_request_alone_takes_as_long_by_either_form(tier, nbytes, begin):
    link = np.zeros(1, np.int64)
    words = words_of(tier, link)
    turn = turn_of(words, nbytes, begin)
    assert turn == begin
    took_s = (due_of(words, begin, turn, nbytes, begin, nbytes) - begin) / 1e9
    assert took_s == pytest.approx(tier.alone_s(nbytes), rel=1e-6, abs=3e-9)


@given(tier=tiers, pieces=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=8))
def test_pieces_that_are_read_at_once_come_one_after_the_other_and_the_last_as_all_of_them(tier, pieces):
    link = np.zeros(1, np.int64)
    words = words_of(tier, link)
    turn, so_far, dues = turn_of(words, sum(pieces), 5), 0, []
    for nbytes in pieces:
        so_far += nbytes
        dues.append(due_of(words, 5, turn, so_far, 5, nbytes))
    assert dues[-1] >= 5 + tier.latency_ns + sum(pieces) * 1e9 / tier.bytes_per_s - 2
    if not tier.group_bytes:
        assert dues == sorted(dues)


def test_the_link_is_one_for_all_threads():
    tier, link, turns = Tier(name="any", latency_ns=0, group_bytes=0, bytes_per_s=10**9), np.zeros(1, np.int64), []
    words = words_of(tier, link)
    start = threading.Barrier(4)

    def work():
        start.wait()
        turns.extend([turn_of(words, 10, 100) for _ in range(500)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turns) == [100 + 10 * at for at in range(2000)]
