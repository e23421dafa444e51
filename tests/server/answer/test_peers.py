"""Who asks: one name for one host, whichever way it came."""

import os
import socket

import pytest

from engrampool_server.answer import peers


@pytest.mark.parametrize(
    ("of_grpc", "peer"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:[::ffff:10.0.0.1]:4711", "10.0.0.1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4711", "10.0.0.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2:ffff::1%5D:1", "2001:db8:1:2::/64"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
        ("unix:/run/pool", "unix"),
        ("unix:", "unix"),
        ("unix-abstract:x", "unix-abstract"),
    ],
)
def test_a_host_is_one_peer_whatever_port_it_calls_from(of_grpc, peer):
    assert peers.of_call(of_grpc) == peer


def test_a_host_is_the_same_peer_on_both_ways():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, (_, port) = listener.accept()
        with accepted:
            assert peers.of_connection(accepted) == peers.of_call(f"ipv4:127.0.0.1:{port}") == "127.0.0.1"


def test_over_a_unix_socket_a_user_is_a_peer():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peers.of_connection(ours) == f"user {os.getuid()}"
