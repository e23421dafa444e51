"""Draws docs/architecture.svg, and fills in the tables of files in docs/ARCHITECTURE.md: `python docs/architecture.py`.

The house as its imports have it: a box for each room (a folder of a package, with all that lies in it) and for files
beside the rooms, an arrow from a box to those that it imports. Rooms are found, not listed here. An arrow that others
imply is left out; one that closes a circle is red. The same imports give the same bytes. A file is described by the
first sentence of its docstring.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
TITLES = {"client": "client: asks", "server": "server: holds, answers", "proto": "proto: what both sides share"}
# Pixels. A letter is as wide as those of a monospaced font.
LETTER, LINE, TITLE, PAD, GAP, BETWEEN_ROWS, MARGIN, CIRCLE = 6.1, 13, 16, 8, 16, 40, 14, 30
LETTERS = 26  # of a line in a box
STYLE = """
text { font: 10px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #33414d }
.title { font-size: 12px; font-weight: bold; fill: #000 }
.package { fill: #eef2f5; stroke: none }
.box { fill: #fff; stroke: #5b7083 }
.arrow { fill: none; stroke: #5b7083; stroke-width: 1.2 }
.wide { fill: none; stroke: #5b7083; stroke-width: 3 }
.circle { stroke: #c62828; stroke-dasharray: 4 3 }
"""

Edge = tuple[str, str]
Files = dict[str, dict[str, str]]  # by place: file -> what it is for


@dataclass
class Box:
    """A room, or files beside the rooms that stand in one row. One without lines only bends an arrow."""

    title: str = ""
    files: list[str] = field(default_factory=list)
    x: float = 0.0  # of its middle
    y: float = 0.0  # of its upper edge
    bend: float = 0.0  # height of one that only bends an arrow: that of its row

    @property
    def lines(self) -> list[str]:
        """Its files, as they are written in it."""
        return textwrap.wrap("  ".join(self.files), LETTERS, break_long_words=False, break_on_hyphens=False)

    @property
    def width(self) -> float:
        """All boxes are alike."""
        return 2 * PAD + LETTER * LETTERS if self.files else 4

    @property
    def height(self) -> float:
        """As many lines as there are."""
        return 2 * PAD - 3 + LINE * len(self.lines) + (TITLE if self.title else 0) if self.files else self.bend


# --- reading


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All of them, those within functions too; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from imports(node)


def read(root: Path) -> tuple[Files, Counter[Edge]]:
    """Gives the files and (place, place) -> imports. A place: "client/lanes", or "client/aio" beside the rooms."""
    places: dict[str, str] = {}
    files: Files = {}
    trees: dict[str, ast.Module] = {}
    for package in TITLES:
        top = root / package / f"engrampool_{package}"
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            module = ".".join((top.name, *parts)).removesuffix(".__init__")
            trees[module] = ast.parse(path.read_text(encoding="utf-8"))
            if parts != ("__init__",):
                places[module] = f"{package}/{parts[0]}"
                if parts[-1] != "__init__":
                    about = " ".join((ast.get_docstring(trees[module]) or "").partition("\n\n")[0].split())
                    sentence = re.split(r"(?<=[.?]) ", about)[0].removesuffix(".")
                    files.setdefault(places[module], {})["/".join(parts[1:] or parts)] = sentence
    edges: Counter[Edge] = Counter()
    for module, tree in trees.items():
        for node in imports(tree):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [one if (one := f"{node.module}.{name}") in places else str(node.module) for name in names]
            edges.update((places[module], places[name]) for name in names if module in places and name in places)
    return files, Counter({edge: count for edge, count in edges.items() if edge[0] != edge[1]})


def is_room(place: str, files: Files) -> bool:
    """Whether it is a folder."""
    return list(files[place]) != [place.split("/")[1]]


def leads(edges: set[Edge], start: str, goal: str) -> bool:
    """Whether arrows go from start to goal."""
    seen, ahead = {start}, [start]
    while ahead:
        at = ahead.pop()
        new = {b for a, b in edges if a == at} - seen
        seen |= new
        ahead += new
    return goal in seen


def without_circles(edges: Counter[Edge]) -> set[Edge]:
    """All but those that close a circle; of each circle the fewest imports are left out."""
    kept: set[Edge] = set()
    for edge in sorted(edges, key=lambda edge: (-edges[edge], edge)):
        if not leads(kept, edge[1], edge[0]):
            kept.add(edge)
    return kept


# --- drawing


class Package:
    """One package's boxes in rows, each above all that it imports."""

    def __init__(self, name: str, files: Files, edges: Counter[Edge]) -> None:
        inside = Counter({edge: n for edge, n in edges.items() if all(at.startswith(name + "/") for at in edge)})
        down = without_circles(inside)
        self.boxes: dict[str, Box] = {}
        self.rows: list[list[str]] = []
        box_of: dict[str, str] = {}
        row_of: dict[str, int] = {}
        places = sorted(place for place in files if place.startswith(name + "/"))
        # Files beside the rooms that none of the package imports are its doors: they stand at the top.
        doors = [at for at in places if not is_room(at, files) and not any(b == at for _, b in down)]
        ahead = [place for place in places if place not in doors]
        while ahead or doors:
            free = [place for place in ahead if not any(a == place and b in ahead for a, b in down)]
            if not ahead:
                free, doors = doors, []
            for place in free:
                title = place.removeprefix(name + "/")
                room = is_room(place, files)
                box_of[place] = key = place if room else f"{name}, row {len(self.rows)}"
                self.boxes.setdefault(key, Box(title + "/" if room else "")).files += files[place]
                row_of[key] = len(self.rows)
            self.rows.append(sorted({box_of[place] for place in free}))
            ahead = [place for place in ahead if place not in free]
        between = {(box_of[a], box_of[b]) for a, b in down}
        self.circles = sorted((box_of[a], box_of[b]) for a, b in set(inside) - down)
        self.arrows = []
        for start, stop in sorted(edge for edge in between if not leads(between - {edge}, *edge)):
            bends = [f"{start} > {stop} in {row}" for row in range(row_of[start] - 1, row_of[stop], -1)]
            for bend, row in zip(bends, range(row_of[start] - 1, row_of[stop], -1), strict=True):
                self.boxes[bend] = Box()
                self.rows[row].append(bend)
            self.arrows.append([start, *bends, stop])
        self._arrange()

    def _arrange(self) -> None:
        """Give each box its place, near those that it is joined to."""
        near: dict[str, list[str]] = {key: [] for key in self.boxes}
        for path in self.arrows:
            for one, other in pairwise(path):
                near[one].append(other)
                near[other].append(one)
        for row in self.rows:
            self._spread(row, dict.fromkeys(row, 0.0))
        for sweep in range(24):
            for row in self.rows if sweep % 2 else reversed(self.rows):
                middles = {key: [self.boxes[one].x for one in near[key]] or [self.boxes[key].x] for key in row}
                row.sort(key=lambda key: (sum(middles[key]) / len(middles[key]), key))
                self._spread(row, {key: sum(at) / len(at) for key, at in middles.items()})
        y = 0.0
        for row in reversed(self.rows):
            height = max(self.boxes[key].height for key in row)
            for key in row:
                box = self.boxes[key]
                box.bend = height
                box.y = y + (height - box.height) / 2
            y += height + BETWEEN_ROWS
        self.height = y - BETWEEN_ROWS
        left = min(box.x - box.width / 2 for box in self.boxes.values())
        self.width = max(box.x + box.width / 2 for box in self.boxes.values()) - left
        for box in self.boxes.values():
            box.x -= left

    def _spread(self, row: list[str], wanted: dict[str, float]) -> None:
        """Boxes side by side in the order of the row, together as near as may be to where each wants to be."""
        at, places = 0.0, []
        for key in row:
            at += self.boxes[key].width / 2
            places.append(at)
            at += self.boxes[key].width / 2 + GAP
        shift = sum(wanted[key] - place for key, place in zip(row, places, strict=True)) / len(row)
        for key, place in zip(row, places, strict=True):
            self.boxes[key].x = place + shift

    def move(self, x: float, y: float) -> None:
        """All of it."""
        for box in self.boxes.values():
            box.x += x
            box.y += y

    def draw(self) -> Iterator[str]:
        """Arrows, and boxes upon them."""
        for path in self.arrows:
            boxes = [self.boxes[key] for key in path]
            points = [at for box in boxes for at in ((box.x, box.y), (box.x, box.y + box.height))]
            yield _arrow(points[1:-1], "arrow")
        for start, stop in self.circles:
            low, high = self.boxes[start], self.boxes[stop]
            points = [(low.x + CIRCLE, low.y), (high.x + CIRCLE, high.y + high.height)]
            yield _arrow(points, "arrow circle")
        for box in self.boxes.values():
            if box.files:
                left = box.x - box.width / 2
                yield _rectangle("box", left, box.y, box.width, box.height)
                y = box.y + PAD + 7
                if box.title:
                    yield f'<text class="title" x="{left + PAD:.1f}" y="{y + 2:.1f}">{box.title}</text>'
                    y += TITLE
                for line in box.lines:
                    yield f'<text x="{left + PAD:.1f}" y="{y:.1f}" xml:space="preserve">{line}</text>'
                    y += LINE


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"/>'


def _arrow(points: list[tuple[float, float]], kind: str) -> str:
    """From point to point: a curve between two rows, straight through those between."""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x, y), (to_x, to_y) in pairwise(points):
        middle = (y + to_y) / 2
        path += f" C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#head)"/>'


def picture(root: Path) -> str:
    """The whole SVG."""
    files, edges = read(root)
    packages = {name: Package(name, files, edges) for name in TITLES}
    above, below = [packages["client"], packages["server"]], packages["proto"]
    edge = MARGIN + TITLE + MARGIN
    deepest = max(package.height for package in above)
    x = 2.0 * MARGIN
    places = {}
    for name in ("client", "server"):
        packages[name].move(x, edge + deepest - packages[name].height)
        places[name] = (x - MARGIN, MARGIN / 2, packages[name].width + 2 * MARGIN, deepest + edge + MARGIN / 2)
        x += packages[name].width + 3 * MARGIN
    width = max(x - MARGIN, below.width + 4 * MARGIN)
    top = MARGIN / 2 + places["client"][3] + BETWEEN_ROWS
    below.move((width - below.width) / 2, top + edge - MARGIN / 2)
    places["proto"] = (MARGIN, top, width - 2 * MARGIN, below.height + edge + MARGIN / 2)
    height = top + places["proto"][3] + MARGIN / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">',
        "<!-- drawn by docs/architecture.py -->",
        f"<style>{STYLE}</style>",
        '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,1 L8,4 L0,7 Z" fill="#5b7083"/></marker>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for name, (left, up, wide, high) in places.items():
        lines.append(_rectangle("package", left, up, wide, high))
        lines.append(f'<text class="title" x="{left + MARGIN:.1f}" y="{up + 18:.1f}">{TITLES[name]}</text>')
    for start, stop in sorted({(a.split("/")[0], b.split("/")[0]) for a, b in edges}):
        if start != stop:
            (left, up, wide, high), (_, to_y, _, _) = places[start], places[stop]
            x = left + wide / 2
            lines.append(f'<path class="wide" d="M{x:.1f},{up + high:.1f} V{to_y - 3:.1f}" marker-end="url(#head)"/>')
    for package in packages.values():
        lines += package.draw()
    return "\n".join([*lines, "</svg>", ""])


def page(text: str, root: Path) -> str:
    """The page with its tables as they are to be. Raises ValueError where a room has no place for one."""
    files, _ = read(root)
    tables: Files = {}
    for place in files:
        tables.setdefault(place if is_room(place, files) else place.split("/")[0], {}).update(files[place])
    for name, table in tables.items():
        lines = ["", "| file | what it is for |", "| --- | --- |"]
        for file, purpose in table.items():
            cell = purpose.replace("|", "\\|")
            lines.append(f"| `{file}.py` | {cell} |")
        begin, end = f"<!-- files of {name} -->\n", "<!-- -->"
        if text.count(begin) != 1:
            raise ValueError(f"docs/ARCHITECTURE.md is to have one place for the files of {name}: {begin}")
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(picture(HERE.parent), encoding="utf-8")
    described = HERE / "ARCHITECTURE.md"
    described.write_text(page(described.read_text(encoding="utf-8"), HERE.parent), encoding="utf-8")
