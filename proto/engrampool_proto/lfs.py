"""git-lfs pointers: the short text that lies in a file's place until the file itself was fetched."""

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
ADVICE = "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`, or download it again"


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with `head`, 40 bytes or more of it, is a pointer."""
    return head.startswith(_FIRST_LINE)
