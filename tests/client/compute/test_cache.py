import itertools
import json
import os
import stat
import struct
import sys
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import CacheFileError
from engrampool_client.compute.cache import HotRows

ENTRY = 24
SET_BYTES = 8 * (ENTRY + 16)
LAYOUT = {"groups": [[1, 2], [14, 2]], "entry_bytes": ENTRY}
# Few enough that tiny caches are asked for the same key again, with the values that an empty slot might be taken for.
KEYS = st.sampled_from([0, -1, 1, 2**63 - 1, -(2**63), 255, *range(100, 130)])
NAMES = st.tuples(KEYS, st.sampled_from([0, 1, 2, 254, 255]))


def arrays(names):
    keys = np.array([key for key, _ in names], np.int64)
    return keys, np.array([group for _, group in names], np.uint8)


def entries_of(names):
    """What the server would send: no two names' bytes are the same."""
    keys, groups = arrays(names)
    words = np.stack([keys, groups.astype(np.int64), keys ^ ~groups.astype(np.int64)], axis=1)
    return words.view(np.uint8).reshape(-1, ENTRY)


def put(cache, names, hinted=False):
    cache.put(*arrays(names), entries_of(names), hinted=hinted)


def held(cache, names):
    """Those that it finds, their bytes checked."""
    rows = cache.find(*arrays(names))
    assert rows.dtype == np.int64
    assert rows.shape == (len(names),)
    found = [name for name, row in zip(names, rows, strict=True) if row >= 0]
    assert np.array_equal(cache.rows[rows[rows >= 0]], entries_of(found))
    return found


def names(count, group=0, start=1000):
    return [(start + number, group) for number in range(count)]


@given(
    sets=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(["find", "put", "hint"]), st.lists(NAMES, max_size=30)), max_size=40),
)
def test_whatever_is_put_and_found_bytes_are_those_of_the_key_and_counts_add_up(sets, steps):
    bound = sets * SET_BYTES + SET_BYTES - 1
    cache = HotRows(bound, ENTRY)
    ever, asked, hits, hinted = set(), 0, 0, 0
    for what, some in steps:
        if what == "find":
            found = held(cache, some)
            assert set(found) <= ever
            asked, hits = asked + len(some), hits + len(found)
        else:
            some = list(dict.fromkeys(some))
            put(cache, some, hinted=what == "hint")
            ever |= set(some)
            hinted += len(some) * ENTRY if what == "hint" else 0
        assert cache.filled <= len(cache.rows) == 8 * sets
        assert cache.nbytes <= bound
        assert (cache.hits, cache.misses, cache.hinted_bytes) == (hits, asked - hits, hinted)
    everything = sorted(ever)
    assert len(held(cache, everything)) == cache.filled
    # Nothing is held that was not found just now.
    assert cache.hinted_used_bytes + cache.hinted_wasted_bytes == hinted


@given(before=st.lists(NAMES, max_size=8, unique=True), some=st.lists(NAMES, max_size=12, unique=True))
def test_a_full_set_makes_room_for_all_new_entries_that_it_can_hold(before, some):
    cache = HotRows(SET_BYTES, ENTRY)
    put(cache, before)
    assert held(cache, before) == before
    put(cache, some)
    new = [name for name in some if name not in before]
    assert [name for name in held(cache, some) if name in new] == new[:8]
    assert cache.filled == min(8, len(set(before) | set(some)))
    assert cache.evicted == len(before) + min(8, len(new)) - cache.filled


def test_many_entries_spread_over_the_sets_and_all_but_a_few_are_kept():
    cache = HotRows(4096 * SET_BYTES, ENTRY)
    many = [(key << shift, key % 256) for shift in (0, 20, 44) for key in range(1, 5001)]
    put(cache, many)  # 3.7 a set of 8
    assert len(held(cache, many)) == cache.filled >= 0.98 * len(many)
    assert cache.evicted == 0


def test_what_was_found_outlives_a_stream_of_what_is_asked_for_once():
    cache = HotRows(SET_BYTES, ENTRY)
    put(cache, names(8))
    for _ in range(2):
        assert len(held(cache, names(3))) == 3
    for number in range(60):
        put(cache, names(1, start=5000 + number))
    assert held(cache, names(8)) == names(3)
    # But not for ever, if nobody asks for them again.
    for number in range(300):
        put(cache, names(1, start=6000 + number))
    assert held(cache, names(8)) == []


def test_entries_put_again_stay_as_they_are():
    cache = HotRows(SET_BYTES, ENTRY)
    put(cache, names(4))
    rows = cache.find(*arrays(names(4)))
    put(cache, names(6))
    assert np.array_equal(cache.find(*arrays(names(4))), rows)
    assert (cache.filled, cache.evicted) == (6, 0)


def test_memory_is_counted_as_it_fills():
    cache = HotRows(10**6, ENTRY)
    empty = cache.nbytes
    assert empty < 10**6 * 16 / (ENTRY + 16) + 1
    put(cache, names(100))
    assert cache.nbytes == empty + 100 * ENTRY


def test_a_hint_counts_until_it_is_found_or_gone():
    cache = HotRows(SET_BYTES, ENTRY)
    put(cache, names(2))
    put(cache, names(4), hinted=True)  # two are there already
    assert (cache.hinted_bytes, cache.hinted_used_bytes, cache.hinted_wasted_bytes) == (4 * ENTRY, 0, 2 * ENTRY)
    twice = names(3) + names(3)
    assert held(cache, twice) == twice
    assert held(cache, twice) == twice
    assert (cache.hinted_used_bytes, cache.hinted_wasted_bytes) == (ENTRY, 2 * ENTRY)
    put(cache, names(11, start=5000), hinted=True)  # three too many for a set, and the unused one goes
    assert (cache.hinted_used_bytes, cache.hinted_wasted_bytes) == (ENTRY, 6 * ENTRY)
    put(cache, names(8, start=7000))
    assert (cache.hinted_bytes, cache.hinted_used_bytes, cache.hinted_wasted_bytes) == (15 * ENTRY, ENTRY, 14 * ENTRY)
    # What took their places is no hint.
    assert len(held(cache, names(8, start=7000))) == 8
    assert cache.hinted_used_bytes == ENTRY


@pytest.mark.parametrize(("nbytes", "entry_bytes"), [(SET_BYTES - 1, ENTRY), (0, ENTRY), (-1, ENTRY), (10**6, 0)])
def test_too_little_memory_is_refused(nbytes, entry_bytes):
    with pytest.raises(ValueError, match=rf"not {nbytes}$"):
        HotRows(nbytes, entry_bytes)
    assert len(HotRows(SET_BYTES, ENTRY).rows) == 8


def test_threads_with_the_lock_held_find_only_right_bytes(tmp_path):
    cache = HotRows(4 * SET_BYTES, ENTRY)
    pool = names(64) + names(64, group=7)
    failures: list[BaseException] = []
    over = threading.Event()

    def ask(seed):
        random = np.random.default_rng(seed)
        try:
            for _ in range(300):
                some = [pool[at] for at in random.permutation(len(pool))[:20]]
                with cache.lock:
                    found = held(cache, some)
                with cache.lock:
                    put(cache, [name for name in some if name not in found], hinted=seed == 0)
        except BaseException as error:
            failures.append(error)

    def save():
        try:
            while not over.is_set():
                cache.save(tmp_path / "cache", "v", LAYOUT)
                held(HotRows.open(tmp_path / "cache", "v", LAYOUT), pool)
        except BaseException as error:
            failures.append(error)

    asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    saving = threading.Thread(target=save)
    for thread in [*asking, saving]:
        thread.start()
    for thread in asking:
        thread.join()
    over.set()
    saving.join()
    assert failures == []
    assert cache.hits + cache.misses == 4 * 300 * 20
    assert cache.hits > 0
    cache.save(tmp_path / "cache", "v", LAYOUT)  # what was saved last may be of the beginning
    assert len(held(HotRows.open(tmp_path / "cache", "v", LAYOUT), pool)) > 0


EVERYTHING = [*names(8), (0, 0), (0, 1), (-1, 255), (-(2**63), 3)]


@pytest.fixture
def cache():
    """Two sets with most of these, of which two were found."""
    cache = HotRows(2 * SET_BYTES, ENTRY)
    put(cache, EVERYTHING)
    assert len(held(cache, [(0, 1), (-1, 255)])) == 2
    return cache


@pytest.fixture
def path(tmp_path, cache):
    cache.save(tmp_path / "sub" / "cache", "v1", LAYOUT)
    return tmp_path / "sub" / "cache"


def test_a_saved_cache_finds_what_it_was_saved_with(cache, path):
    opened = HotRows.open(path, "v1", dict(reversed(LAYOUT.items())))
    kept = held(cache, EVERYTHING)
    assert held(opened, EVERYTHING + names(50, start=0)[1:]) == kept
    assert (opened.hits, opened.misses) == (len(kept), len(EVERYTHING) + 49 - len(kept))
    assert opened.filled == cache.filled == len(kept)
    assert opened.entry_bytes == ENTRY
    assert opened.read_only
    assert not opened.rows.flags.writeable
    with pytest.raises(ValueError, match="opened to be read"):
        put(opened, names(1))
    assert [one.name for one in path.parent.iterdir()] == ["cache"]


def test_an_empty_cache_can_be_saved(tmp_path):
    HotRows(SET_BYTES, ENTRY).save(tmp_path / "cache", "v1", LAYOUT)
    assert held(HotRows.open(tmp_path / "cache", "v1", LAYOUT), EVERYTHING) == []


def test_a_bounded_file_holds_what_was_found_most(cache, path, tmp_path):
    room = path.stat().st_size - (cache.filled - 2) * (ENTRY + 8)
    cache.save(tmp_path / "small", "v1", LAYOUT, max_bytes=room + ENTRY - 1)
    assert (tmp_path / "small").stat().st_size <= room
    assert held(HotRows.open(tmp_path / "small", "v1", LAYOUT), EVERYTHING) == [(0, 1), (-1, 255)]
    # And so does one that is saved of a file.
    HotRows.open(path, "v1", LAYOUT).save(tmp_path / "again", "v2", LAYOUT, max_bytes=room)
    assert held(HotRows.open(tmp_path / "again", "v2", LAYOUT), EVERYTHING) == [(0, 1), (-1, 255)]
    with pytest.raises(ValueError, match="more than max_bytes=300"):
        cache.save(tmp_path / "smaller", "v1", LAYOUT, max_bytes=300)
    assert not (tmp_path / "smaller").exists()


def test_a_file_in_use_can_be_saved_over(cache, path):
    opened = HotRows.open(path, "v1", LAYOUT)
    before = held(opened, EVERYTHING)
    other = HotRows(SET_BYTES, ENTRY)
    put(other, names(3, start=9000))
    other.save(path, "v2", LAYOUT)
    assert held(opened, EVERYTHING) == before
    assert held(HotRows.open(path, "v2", LAYOUT), names(3, start=9000)) == names(3, start=9000)


def test_what_goes_while_a_file_is_written_is_left_out(cache, tmp_path):
    class Lock:
        taken = 0

        def __enter__(self):
            self.taken += 1
            if self.taken == 2:  # after the index was copied, before the rows are
                put(cache, names(4, start=9000))

        def __exit__(self, *_):
            pass

    before = held(cache, EVERYTHING)
    cache.lock = Lock()
    cache.save(tmp_path / "cache", "v1", LAYOUT)
    opened = HotRows.open(tmp_path / "cache", "v1", LAYOUT)
    after = held(cache, EVERYTHING)
    assert len(after) < len(before)
    assert held(opened, EVERYTHING + names(4, start=9000)) == after


def test_a_failed_save_leaves_what_was_there(cache, path, monkeypatch):
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path, "v2", LAYOUT)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda whole: b"", "no cache file"),
        (lambda whole: b"EPCACHE2", "no cache file"),
        (lambda whole: b"EPCACHE1" + whole[8:], "no cache file"),
        (lambda whole: bytes(len(whole)), "no cache file"),
        (lambda whole: b"\x93NUMPY" + whole, "no cache file"),
        (lambda whole: whole[:60], "damaged, its header"),
        (lambda whole: b"EPCACHE2" + b"\xff" * 8 + whole[16:], "damaged, its header"),
        (lambda whole: whole.replace(b'"v1"', b'"v2"'), "damaged, its header"),
        (lambda whole: whole[:-1], "bytes and should have"),
        (lambda whole: whole[:5000], "bytes and should have"),
        (lambda whole: whole + b"\0", "bytes and should have"),
    ],
)
def test_damaged_files_are_refused(path, damage, text):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheFileError, match=rf"{text}.* delete it, and save it again"):
        HotRows.open(path, "v1", LAYOUT)


INDEX_BYTES, ROWS_AT = 16 * 14, 8192


@given(st.data(), st.sampled_from(["index", "rows", "sums"]), st.integers(0, 7))
def test_one_wrong_bit_is_refused_or_its_row_is_missed(tmp_path_factory, data, part, bit):
    path = tmp_path_factory.mktemp("bits") / "cache"
    cache = HotRows(2 * SET_BYTES, ENTRY)
    put(cache, EVERYTHING)
    cache.save(path, "v1", LAYOUT)
    whole = bytearray(path.read_bytes())
    parts = {"index": (4096, INDEX_BYTES), "rows": (ROWS_AT, cache.filled * ENTRY), "sums": (-8 * cache.filled, 8)}
    begin, size = parts[part]
    whole[begin + data.draw(st.integers(0, size - 1))] ^= 1 << bit
    path.write_bytes(whole)
    if part != "rows":
        with pytest.raises(CacheFileError, match="damaged, its index"):
            HotRows.open(path, "v1", LAYOUT)
        return
    opened, kept = HotRows.open(path, "v1", LAYOUT), held(cache, EVERYTHING)
    for _ in range(2):
        found = held(opened, EVERYTHING + EVERYTHING)
        assert len(set(found)) == len(kept) - 1
        assert set(found) < set(kept)
    assert opened.damaged == 1
    # Saved again it is not made right.
    opened.save(path, "v1", LAYOUT)
    again = HotRows.open(path, "v1", LAYOUT)
    assert held(again, EVERYTHING) == found[: len(kept) - 1]
    assert again.damaged == 0


def test_damaged_rows_are_said_once(cache, path, caplog):
    whole = bytearray(path.read_bytes())
    whole[ROWS_AT : ROWS_AT + 3 * ENTRY] = bytes(3 * ENTRY)
    path.write_bytes(whole)
    opened, kept = HotRows.open(path, "v1", LAYOUT), held(cache, EVERYTHING)
    for name in EVERYTHING:
        held(opened, [name])
    assert (opened.damaged, opened.hits, opened.misses) == (3, len(kept) - 3, len(EVERYTHING) - len(kept) + 3)
    assert len(caplog.messages) == 1
    assert "cache is damaged; its wrong rows come from the server instead" in caplog.text


@pytest.mark.parametrize("change", [lambda file: file.truncate(100), lambda file: file.write(bytes(8192))])
def test_a_file_that_is_written_to_in_place_is_used_no_more(path, change, caplog):
    opened = HotRows.open(path, "v1", LAYOUT)
    assert held(opened, EVERYTHING)
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        change(file)
    os.utime(path, ns=(before, max(before + 1, path.stat().st_mtime_ns)))  # where the clock has not moved on
    for _ in range(2):
        assert held(opened, EVERYTHING) == []
    assert len(caplog.messages) == 1
    assert "cache was written to and is used no more: replace such a file by renaming" in caplog.text


def rewrite(path, change_header=lambda header: None, change_index=lambda index: None):
    """Damage that its checksums vouch for."""
    whole = bytearray(path.read_bytes())
    header = json.loads(whole[24 : 24 + struct.unpack_from("<Q", whole, 8)[0]])
    sums_at = len(whole) - 8 * header["entries"]
    index = np.frombuffer(whole, np.uint8, INDEX_BYTES, 4096)
    change_index(index)
    header["index_xxh3"] = xxhash.xxh3_64_hexdigest(index.tobytes() + whole[sums_at:])
    change_header(header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    whole[8 : 24 + len(text)] = struct.pack("<QQ", len(text), xxhash.xxh3_64_intdigest(text)) + text
    path.write_bytes(whole)


@pytest.mark.parametrize("row", [-1, 2**31 - 1, "entries"])
def test_an_index_that_names_rows_which_are_not_there_is_refused(cache, path, row):
    def change(index):
        used = np.flatnonzero(index[12 * 16 :].view("<i2") != -1)
        index[8 * 16 : 12 * 16].view("<i4")[used[0]] = cache.filled if row == "entries" else row

    rewrite(path)
    HotRows.open(path, "v1", LAYOUT)
    rewrite(path, change_index=change)
    with pytest.raises(CacheFileError, match="damaged, its index names rows that it has not: delete it"):
        HotRows.open(path, "v1", LAYOUT)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.clear(),
        lambda header: header.pop("layout"),
        lambda header: header.update(entries=-1),
        lambda header: header.update(sets="2"),
        lambda header: header.update(entry_bytes=0),
        lambda header: header.update(ways=True),
    ],
)
def test_a_header_that_is_none_is_refused(path, change):
    rewrite(path, change)
    with pytest.raises(CacheFileError, match="damaged, its header"):
        HotRows.open(path, "v1", LAYOUT)


def test_only_its_owner_may_read_it_finished_or_not(cache, path, monkeypatch):
    seen = []

    def look(descriptor):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    path.chmod(0o644)
    monkeypatch.setattr("os.fsync", look)
    before = os.umask(0)
    try:
        cache.save(path, "v1", LAYOUT)
    finally:
        os.umask(before)
    assert [*seen, stat.S_IMODE(path.stat().st_mode)] == [0o600, 0o600]


def test_files_of_another_model_or_layout_are_refused(path):
    with pytest.raises(CacheFileError, match="holds rows of version v1, the model's is v2"):
        HotRows.open(path, "v2", LAYOUT)
    with pytest.raises(CacheFileError, match=r"saved for the layout .*'entry_bytes': 24.*this client's is .*48"):
        HotRows.open(path, "v1", {**LAYOUT, "entry_bytes": 48})


def test_a_file_that_cannot_be_read_is_said_so(tmp_path):
    with pytest.raises(CacheFileError, match=r"cache cannot be read \(No such file or directory\)"):
        HotRows.open(tmp_path / "cache", "v1", LAYOUT)
    with pytest.raises(CacheFileError, match="Is a directory"):
        HotRows.open(tmp_path, "v1", LAYOUT)


def test_ctrl_c_at_any_line_of_a_put_leaves_no_key_with_another_row():
    """What is found is what was put, whatever line it was interrupted at, and room is never lost."""
    keys = np.arange(400, dtype=np.int64)

    def entries_of(keys, group):
        return (keys[:, None] * 31 + np.arange(16) + 7 * group).astype(np.uint8)

    for at in itertools.count():
        cache, lines, raised = HotRows(20_000, 16), [at], []

        def line(frame, event, arg, lines=lines, raised=raised):
            if event == "line" and not raised:
                lines[0] -= 1
                if lines[0] < 0:
                    raised.append(True)
                    raise KeyboardInterrupt
            return line

        def call(frame, event, arg):
            return line if frame.f_code.co_filename.endswith(("/cache.py", "/index.py")) else None

        for group in range(4):  # until some have to make room
            groups = np.full(len(keys), group, np.uint8)
            sys.settrace(call if group == 2 else None)
            try:
                cache.put(keys, groups, entries_of(keys, group))
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
        for group in range(4):
            found = cache.find(keys, np.full(len(keys), group, np.uint8))
            there = found >= 0
            assert np.array_equal(cache.rows[found[there]], entries_of(keys[there], group)), at
        assert len(np.unique(cache._index.rows)) == len(cache.rows)
        if not raised:
            break
    assert at > 20
