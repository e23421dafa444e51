"""Files of credentials that are none: nobody waits for them, nor takes what they hold into memory."""

import os

import pytest

from engrampool_proto.security.pem import PemError, PemFiles
from engrampool_proto.security.small_file import MOST_BYTES, read_small


def test_a_file_is_read_through_links_as_kubernetes_makes_them(tmp_path):
    (tmp_path / "data").write_bytes(b"all of it")
    (tmp_path / "link").symlink_to("data")
    assert read_small(tmp_path / "link") == b"all of it"


def test_what_is_no_file_or_too_large_for_one_is_refused_at_once(tmp_path):
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)  # which nobody writes to
    large.touch()
    os.truncate(large, MOST_BYTES + 1)
    for path, said in ((pipe, "regular file"), (tmp_path, "Is a directory"), ("/dev/zero", "regular"), (large, "more")):
        with pytest.raises(OSError, match=said):
            read_small(path)
    os.truncate(large, MOST_BYTES)
    assert len(read_small(large)) == MOST_BYTES
    with pytest.raises(PemError, match=r"tls_ca: .*pipe cannot be read: it is no regular file"):
        PemFiles(pipe).read()
