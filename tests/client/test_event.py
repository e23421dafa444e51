"""Events that are set, and waited for, whatever Ctrl-C comes into."""

import linecache
import sys
import threading
from contextlib import suppress

import pytest

from engrampool_client import event
from engrampool_client.event import Event
from server_fixtures import LIMIT_S


def test_it_is_waited_for_until_it_is_set():
    one, woken = Event(), []
    threads = [threading.Thread(target=lambda: woken.append(one.wait(LIMIT_S))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert not one.wait(0)
    one.set()
    for thread in threads:
        thread.join()
    assert woken == [True] * 3
    assert one.is_set()
    assert one.wait()
    one.clear()
    assert not one.wait(0.0)


@pytest.mark.parametrize("call", ["set", "wait"])
def test_no_lock_is_left_taken_wherever_ctrl_c_comes(call):
    for at in range(200):
        one, left = Event(), [at]

        def line(frame, what, _, left=left):
            code = frame.f_code
            if code.co_filename not in (event.__file__, threading.__file__):
                return None
            # Not where a `with` begins, or ends: there it would come before a lock is let go of, which Ctrl-C cannot.
            text = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
            if what == "line" and not text.startswith("with "):
                left[0] -= 1
                if left[0] == -1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return line

        with suppress(KeyboardInterrupt):
            sys.settrace(line)
            getattr(one, call)(*([0.0] if call == "wait" else []))
        sys.settrace(None)
        ended = threading.Thread(target=one.set, daemon=True)
        ended.start()
        ended.join(LIMIT_S)
        assert not ended.is_alive(), at
        assert one.wait(LIMIT_S)
        if left[0] >= 0:
            break
    else:
        pytest.fail("it never came to its end")
