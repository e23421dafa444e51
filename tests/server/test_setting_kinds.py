import pytest

from engrampool_server.setting_kinds import Boolean, Listen, Size, format_size, split_address


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1KiB", 1 << 10),
        ("1 MiB", 1 << 20),
        ("4097", 4097),
        ("512MiB", 512 << 20),
        ("3GiB", 3 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, size_bytes):
    assert Size(0, 1 << 40).parse(text) == size_bytes
    assert format_size(size_bytes) == text.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("FALSE", False), ("0", False)]
)
def test_booleans(text, value):
    assert Boolean().parse(text) is value


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("my_host-1.example:0", ("my_host-1.example", 0)),
        ("[0:0::1]:65535", ("[::1]", 65535)),
        ("[fe80::1%eth0]:1", ("[fe80::1%eth0]", 1)),
    ],
)
def test_addresses(address, parts):
    assert split_address(address) == parts
    assert Listen().parse(address) == f"{parts[0]}:{parts[1]}"


def test_what_is_no_address_names_itself():
    with pytest.raises(ValueError, match=r"not HOST:PORT .*: 'host:65536'"):
        split_address("host:65536")
