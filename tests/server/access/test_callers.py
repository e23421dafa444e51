"""The file of callers: what it may say, and what each mistake in it is told as."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certificates import digest, write_callers
from engrampool_server.access.callers import MOST_CALLERS, READ, Caller, Callers, CallersFileError, bearer, read_callers


def entry(**changed):
    return {key: value for key, value in {"name": "a", "token": "sesame", **changed}.items() if value is not None}


def test_callers_are_known_by_their_tokens_and_their_names_in_certificates(tmp_path):
    limits = {"max_rows_per_s": 5, "max_in_flight_bytes": "2MiB", "max_connections": 3}
    path = write_callers(
        tmp_path / "callers",
        {"name": "engine", "tokens": ["one", "two"], "certificate": ["engine.svc", "engine"], **limits},
        {"name": "operator", "token": "three", "roles": ["admin", "metrics"]},
    )
    callers = read_callers(path)
    engine = [callers.of_token(b"one"), callers.of_token(b"two"), callers.of_certificate(["x", "engine"])]
    for found in engine:
        assert (found.name, found.roles) == ("engine", {"read"})
        assert (found.max_rows_per_s, found.max_in_flight_bytes, found.max_connections) == (5, 2 << 20, 3)
        assert callers.of_key(found.key) == found
    assert len({found.key for found in engine}) == 3  # one of them can be revoked
    assert callers.of_token(b"three").roles == {"admin", "metrics"}
    assert callers.of_token(b"four") is callers.of_certificate(["four"]) is callers.of_key(bytes(32)) is None
    assert callers.names == {"engine", "operator"}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(name="a b")], "name must be"),
        ([entry(name="")], "name must be"),
        ([entry(roles=[])], "roles of 'a' must be some of read, admin, metrics"),
        ([entry(roles=["root"])], "roles of 'a'"),
        ([{"name": "a"}], "neither token_sha256 nor certificate"),
        ([{"name": "a", "token_sha256": "sesame"}], "64 hexadecimal digits"),
        # Of which a header without any token would be, and so everybody.
        ([entry(token_sha256=["a" * 64, digest("")], token=None)], "is the digest of no token"),
        ([entry(token_sha256=digest("").upper(), token=None)], "is the digest of no token"),
        ([entry(token_sha256=digest("\n"), token=None)], "is the digest of no token"),
        ([{"name": "a", "token_sha256": [1]}], "token_sha256 must be a text, or a list"),
        ([entry(certificate=[""])], "certificate must be a text"),
        ([entry(), entry()], "number 2: a second caller 'a'"),
        ([entry(), entry(name="b")], "'b' has the token of 'a'"),
        (
            [entry(certificate="x"), entry(name="b", token="t", certificate="x")],
            "'b' has the certificate's name of 'a'",
        ),
        ([entry(max_rows_per_s=0)], "max_rows_per_s of 'a' must be"),
        ([entry(max_rows_per_s=True)], "max_rows_per_s of 'a' must be"),
        ([entry(max_in_flight_bytes="1GB")], "max_in_flight_bytes of 'a' must be"),
        ([entry(max_connections=-1)], "max_connections of 'a' must be"),
        ([entry(limit=1)], "no key 'limit'; there are name, roles"),
        ([entry(name=f"n{at}", token=f"t{at}") for at in range(MOST_CALLERS + 1)], "at most"),
    ],
)
def test_mistakes_are_named(tmp_path, entries, said):
    with pytest.raises(CallersFileError, match=said) as caught:
        read_callers(write_callers(tmp_path / "callers", *entries))
    assert "sesame" not in str(caught.value)  # errors go to the log


def test_no_token_is_nobodys_whatever_is_known():
    everybody = Caller("everybody", frozenset({READ}))
    assert Callers({hashlib.sha256(b"").digest(): everybody}, {}).of_token(b"") is None


@pytest.mark.parametrize(
    "raw", [b"", b"x = 1", b"[[caller", b"\xff", b"caller = 1", b"[caller]\nname = 1", b"caller = " + b"[" * 10_000]
)
def test_what_is_no_such_file_is_refused(tmp_path, raw):
    path = tmp_path / "callers"
    path.write_bytes(raw)
    with pytest.raises(CallersFileError, match="tokens: "):
        read_callers(path)
    with pytest.raises(CallersFileError, match="cannot be read"):
        read_callers(tmp_path / "nowhere")


@given(
    st.binary(max_size=200) | st.text(st.sampled_from("[]caller=\"'\n name=roles1.,{}"), max_size=80).map(str.encode)
)
def test_whatever_is_in_the_file_is_callers_or_one_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("callers") / "callers"
    path.write_bytes(raw)
    try:
        assert not read_callers(path).names
    except CallersFileError as error:
        assert "tokens: " in str(error)  # noqa: PT017


def test_a_token_is_what_follows_bearer():
    assert [bearer(text) for text in ("Bearer a", "bearer b", "Basic c", "", "Bearer")] == ["a", "b", "", "", ""]
    assert len(digest("a")) == 64
