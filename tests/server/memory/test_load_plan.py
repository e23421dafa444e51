"""`engrampool plan` with a load: its formulas, by figures that were worked out by hand."""

import json

import pytest
from click.testing import CliRunner

from engrampool_proto.tiers.tier import Tier, TierError
from engrampool_server.commands.plan import plan
from engrampool_server.memory.load_plan import Costs, LoadPlan, Traffic
from server_fixtures import SPEC, pack

# SPEC has six rows of 264 bytes a token in layer 2, and two of 42 in layer 9.
FIRST, BOTH = 1584, 1668
LINK = Tier(name="any", latency_ns=1_000_000, group_bytes=0, bytes_per_s=10**9)
COSTS = Costs(call_s=1e-4, s_per_gb=0.5, gib_price=2.0, server_price=100.0)


def made(**changed):
    settings = {
        "spec": SPEC,
        "shards": 2,
        "replicas": 3,
        "memory_bytes": 10 << 30,
        "traffic": {"decode": Traffic(tokens_per_s=1e6, batch=100, asked=0.5, forward_s=0.01)},
        "link": LINK,
        "layers": 10,
        "hosts": 4,
        "costs": COSTS,
    }
    return LoadPlan(**settings | changed)


def test_what_a_load_asks_for():
    found = made()
    assert found.gb_per_s == pytest.approx(1e6 * 0.5 * BOTH / 1e9)
    assert (found.servers, found.servers_by_link) == (6, 1)
    # 10,000 steps a second, each a call to both shards.
    assert found.cores == pytest.approx(20_000 * 1e-4 + found.gb_per_s * 0.5)
    assert found.pool_price == pytest.approx(10 * 2 + 6 * 100)
    assert found.copies_price == pytest.approx(4 * SPEC.nbytes / 2**30 * 2)


def test_when_rows_are_there_and_what_layers_wait():
    found = made()
    for layer, token_bytes in ((2, FIRST), (9, BOTH)):
        nbytes = token_bytes * 100 * 0.5 / 2
        there = 1e-4 + nbytes / 1e9 * 0.5 + 1e-3 + nbytes / 1e9
        assert found.there_s("decode", layer) == pytest.approx(there)
    assert found.waits() == {"decode": {2: 0.0, 9: 0.0}}
    hurried = made(traffic={"decode": Traffic(tokens_per_s=1, batch=100, asked=0.5, forward_s=1e-3)})
    assert hurried.waits()["decode"][2] == pytest.approx(hurried.there_s("decode", 2) - 2e-4)
    assert made(layers=None).waits() == {}


def test_more_load_wants_more_of_everything():
    traffic = [{"prefill": Traffic(tokens_per_s=rate, batch=1000, asked=1.0)} for rate in (1e5, 1e6, 1e7)]
    plans = [made(traffic=one) for one in traffic]
    assert sorted(one.cores for one in plans) == [one.cores for one in plans]
    assert [one.servers_by_link for one in plans] == [1, 2, 17]
    assert "(more than there are: add replicas)" in str(plans[-1])


def run(*arguments):
    return CliRunner().invoke(plan, list(map(str, arguments)), standalone_mode=True)


def test_the_command_adds_what_a_load_asks_for(tmp_path):
    packed = pack(tmp_path / "small")
    load = ("--prefill-tokens-s", 1e6, "--decode-tokens-s", 1e5, "--layers", 12, "--decode-ms", 12)
    shown = run(packed, *load, "--hosts", 3, "--link", "cxl-direct").output
    assert "calculated, not measured:" in shown
    assert "links of 18 GB/s (cxl-direct): 1 of 1 servers" in shown
    assert "decode of 64 tokens: layer 2 has its rows after " in shown
    assert "a copy on each of 3 hosts" in shown
    document = json.loads(run(packed, *load, "--json").output)
    assert document["load"]["gb_per_s"] == pytest.approx((1e6 * 0.632 + 1e5 * 0.994) * BOTH / 1e9)
    assert set(document["load"]["waits_s"]) == {"decode"}
    assert "load" not in json.loads(run(packed, "--json").output)
    assert "calculated" not in run(packed).output
    assert isinstance(run(packed, *load, "--link", "token-ring").exception, TierError)
    assert "not in the range" in run(packed, "--decode-tokens-s", -1).output


def test_a_calibration_stands_for_what_is_not_typed(tmp_path):
    packed, file = pack(tmp_path / "small"), tmp_path / "here.json"
    file.write_text(json.dumps({"call_us": 200, "s_per_gb": 0.25}))
    words = (packed, "--decode-tokens-s", 1e5, "--json", "--calibration", file)

    def cores(*more: object) -> float:
        return json.loads(run(*words, *more).output)["load"]["cores"]

    gb_per_s = 1e5 * 0.994 * BOTH / 1e9
    assert cores() == pytest.approx(1e5 / 64 * 200e-6 + gb_per_s * 0.25)
    assert cores("--call-us", 110) == pytest.approx(1e5 / 64 * 110e-6 + gb_per_s * 0.25)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "it must be a JSON object of call_us and s_per_gb"),
        ('{"call_us": 1}', "it must be a JSON object of call_us and s_per_gb"),
        ('{"call_us": 0, "s_per_gb": 1}', "call_us must be a number above 0; it is 0"),
        ('{"call_us": 1, "s_per_gb": NaN}', "s_per_gb must be a number above 0; it is nan"),
        ('{"call_us": true, "s_per_gb": 1}', "call_us must be a number above 0; it is True"),
    ],
)
def test_a_calibration_that_is_none_is_refused(tmp_path, text, why):
    packed, file = pack(tmp_path / "small"), tmp_path / "here.json"
    file.write_text(text)
    found = run(packed, "--decode-tokens-s", 1e5, "--calibration", file)
    assert found.exit_code == 2
    assert why in found.output.replace("\n", " ")
