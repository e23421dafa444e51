"""Certificates and keys from files: what is no pair, no PEM, or not there is refused by its name."""

import ssl

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certificates import Authority
from engrampool_proto.security.pem import PemError, PemFiles


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def test_files_that_fit_are_read(authority):
    cert, key = authority.sign("a")
    pem = PemFiles(authority.ca, cert, key).read()
    assert (pem.ca, pem.cert, pem.key) == (authority.ca.read_bytes(), cert.read_bytes(), key.read_bytes())
    assert "PRIVATE" not in repr(pem)
    assert PemFiles().paths == []


@pytest.mark.parametrize("what", ["another key", "a certificate as key", "junk", "nothing", "encrypted"])
def test_files_that_do_not_fit_are_refused(authority, tmp_path, what):
    cert, key = authority.sign("a")
    other = tmp_path / "other"
    if what == "another key":
        other = authority.sign("b")[1]
    elif what == "a certificate as key":
        other = cert
    elif what == "junk":
        other.write_bytes(b"junk")
    elif what == "encrypted":
        made = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(made, ec.EllipticCurvePrivateKey)
        locked = serialization.BestAvailableEncryption(b"secret")
        other.write_bytes(made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(PemError, match="tls_key: .*encrypted" if what == "encrypted" else "tls_(cert|key)") as caught:
        PemFiles(None, cert, other).read()
    assert str(other) in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff"]
)
def test_authorities_that_are_none_are_refused(tmp_path, raw):
    path = tmp_path / "ca"
    path.write_bytes(raw)
    with pytest.raises(PemError, match=r"client_ca: .*ca holds no certificate"):
        PemFiles(path, None, None, ("client_ca", "", "")).read()
    with pytest.raises(PemError, match=r"tls_ca: .*cannot be read"):
        PemFiles(tmp_path / "nowhere").read()


def test_a_pair_that_changes_while_it_is_read_is_refused(authority, monkeypatch):
    cert, key = authority.sign("a")
    others = authority.sign("b")
    load = ssl.SSLContext.load_cert_chain

    def swap(context, *args, **kwargs):
        load(context, *args, **kwargs)
        cert.write_bytes(others[0].read_bytes())

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", swap)
    with pytest.raises(PemError, match="changed while"):
        PemFiles(None, cert, key).read()
