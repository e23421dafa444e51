"""Has the C library keep the memory of past messages for the next ones.

glibc may map every buffer of a megabyte afresh and give it back after use, so that each message pays for its pages'
first touch; gRPC has several such buffers a call.
"""

import ctypes

# Parameters of mallopt(3), all set together: one left alone, glibc would go on adapting the others.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_SETTINGS = (
    (_M_MMAP_THRESHOLD, 1 << 30),
    (_M_TRIM_THRESHOLD, (1 << 31) - 1),
    (_M_TOP_PAD, 64 << 20),
    (_M_ARENA_MAX, 1),
)


def pin_malloc() -> bool:
    """Keep freed memory in this process from now on: up to what it used at its peak. For the whole process, for good.

    All threads then share one arena: threads that allocate at the same time wait for each other.
    Returns False, having changed nothing, where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) for parameter, value in _SETTINGS)
