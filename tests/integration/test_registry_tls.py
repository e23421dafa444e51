"""A pool whose registry is reached over TLS only, with certificates on both sides."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from certificates import Authority, yesterday
from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.registry.etcd import Published, Registry, RegistryError
from engrampool_server.files.table_files import PackedModel
from etcd_process import EtcdProcess, running_etcd
from server_fixtures import PATIENCE, eventually, expected, lasting_address, pack


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("an authority & more"))


@pytest.fixture(scope="module")
def etcd(tmp_path_factory, authority) -> Iterator[EtcdProcess]:
    cert, key = authority.sign("etcd", ["127.0.0.1"])
    flags = [f"--cert-file={cert}", f"--key-file={key}", "--client-cert-auth", f"--trusted-ca-file={authority.ca}"]
    with running_etcd(tmp_path_factory.mktemp("etcd"), flags=flags, tls=True) as etcd:
        yield etcd


def url(etcd: EtcdProcess, **files: Path) -> str:
    query = "&".join(f"{name}={quote(str(path))}" for name, path in files.items())
    return f"etcds://{etcd.address}/pool" + (query and f"?{query}")


def of(authority: Authority, **other) -> dict[str, Path]:
    cert, key = authority.sign("member", **other)
    return {"ca": authority.ca, "cert": cert, "key": key}


def test_servers_join_and_clients_follow_a_registry_over_tls(etcd, authority, tmp_path):
    packed, where = pack(tmp_path / "small"), url(etcd, **of(authority))
    with PackedModel.open(packed) as files:
        spec, version = files.spec, files.version
    registry = Registry(where)
    rows = {table.layer: table.num_rows for table in spec.tables}
    registry.publish(Published(spec.name, version, str(packed), None, spec.digest, rows))
    settings = {"registry": where, "memory": f"file:{tmp_path / 'held'}", "listen": lasting_address(), "workers": 1}
    (tmp_path / "held").mkdir()
    with serve_process(**settings, **authority.of_server(), tls_client_ca=authority.ca):
        eventually(lambda: registry.read().holders(spec.name, version))
        registry.activate(spec.name, version)
        mine = of(authority)
        with Client(where, tls_ca=authority.ca, tls_cert=mine["cert"], tls_key=mine["key"], **PATIENCE) as pool:
            assert pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])


def test_what_is_wrong_with_a_certificate_is_said(etcd, authority, tmp_path):
    other = Authority(tmp_path, "other")
    for files, said in (
        ({**of(authority), "ca": other.ca}, "no TLS connection that can be trusted"),
        ({"ca": authority.ca}, "cannot be asked"),
        (of(authority, valid=yesterday()), "cannot be asked"),
        ({"ca": tmp_path / "nowhere"}, "nowhere cannot be read"),
        ({}, "no TLS connection that can be trusted"),
    ):
        with pytest.raises(RegistryError, match=said):
            Registry(url(etcd, **files)).read()
    with pytest.raises(RegistryError, match="cannot be asked"):
        Registry(f"etcd://{etcd.address}/pool").read()


@pytest.mark.parametrize(
    "query", ["?", "?ca", "?ca=", "?ca=a&ca=b", "?cert=a", "?key=a", "?other=a", "?ca=a&cert=b", "?ca=a#b"]
)
def test_a_url_that_names_no_pair_of_files_is_refused(query):
    with pytest.raises(ValueError, match="not etcd://HOST:PORT"):
        Registry(f"etcds://a:1/pool{query}")
    with pytest.raises(ValueError, match="not etcd://HOST:PORT"):
        Registry("etcd://a:1?ca=b")
