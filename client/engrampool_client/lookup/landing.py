"""Where the rows of a request go: lanes write them there, and layers that are whole are handed over."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import ProtocolError
from engrampool_client.lookup.delivery import Blank, Delivery, Rows, Valid
from engrampool_proto.errors import BatchError
from engrampool_proto.spec import ModelSpec, TableSpec

_UINT8 = np.dtype(np.uint8)
_NONE: Mapping[int, Any] = {}
# To find out whether arrays share memory, in steps of numpy's search; slices of one array take few.
_MOST_WORK: Any = 1 << 16
# By layer: an array for its rows, or one for each of some segments of them.
Out = Mapping[int, Rows | Mapping[str, Rows]]


@dataclass(frozen=True, eq=False)
class Places:
    """Where rows that come belong among others. Each `run` of them lie side by side there, too.

    rows: uint8 [N, row_bytes], C-contiguous. first: int64 [runs], the place of the first row of each.
    """

    rows: Rows
    first: npt.NDArray[np.int64]
    run: int

    def of(self, some: "slice | npt.NDArray[np.int64]") -> "Places":
        """Of some of the rows that come."""
        run = self.run
        if isinstance(some, slice) and some.start % run == some.stop % run == 0:
            return Places(self.rows, self.first[some.start // run : some.stop // run], run)
        return Places(self.rows, self._each()[some], 1)  # cut anywhere

    def put(self, rows: Rows) -> None:
        """Write rows there that came elsewhere, uint8 [n, row_bytes]."""
        self.rows[self._each()] = rows

    def _each(self) -> npt.NDArray[np.int64]:
        return (self.first[:, None] + np.arange(self.run)).reshape(-1)


class Landing:
    """The rows of one request, as they come: each layer's in the order in which they were asked for.

    A lane writes to `destination`, tells `received`, and then has what is whole handed over by `hand_over`. One thread
    at a time.

    delivery: of the lookup. shapes: layer -> shape of its rows, the last number their bytes. ready: layers that are
    complete, and not handed over. owned: whether all arrays are its own: nobody minds what is written into them after
    the step ended; else it is to be written within `delivery.writing`.

    given: layer -> uint8 array of the layer's shape, C-contiguous and writable, that its rows are written into; a layer
    without one gets an array of ours.
    """

    def __init__(
        self, delivery: Delivery, shapes: Mapping[int, tuple[int, ...]], given: Mapping[int, Rows] | None = None
    ) -> None:
        self.delivery, self.shapes = delivery, dict(shapes)
        self.owned = not given
        self.sizes: dict[int, int] = {}
        self._arrays: dict[int, Rows] = {}
        # Layers that no rows come for (a batch of no tokens) are complete from the start.
        self.ready: list[int] = []
        for layer, shape in self.shapes.items():
            self.sizes[layer] = size = math.prod(shape)
            if not size:
                self._arrays[layer] = np.empty(0, np.uint8)
                self.ready.append(layer)
        for layer, array in (given or {}).items():
            self._arrays[layer] = array.reshape(-1)
        self._have = dict.fromkeys(self.sizes, 0)
        self.placed: set[int] = set()  # layers whose rows are written to their `places`

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return self._have == self.sizes

    def missing(self) -> tuple[tuple[int, int], ...]:
        """(layer, bytes) of the layers that are not complete, in the order in which a server sends them."""
        sizes = self.sizes
        return tuple([(layer, sizes[layer]) for layer in sorted(sizes) if self._have[layer] != sizes[layer]])

    def destination(self, layer: int, first: int, nbytes: int) -> memoryview:
        """Where the next `nbytes` of a layer belong, from its row `first` on; tell `received` when they are there.

        Raises ProtocolError unless they were asked for and follow what came before.
        """
        size, have = self.sizes.get(layer), self._have.get(layer, 0)
        if size is None:
            raise ProtocolError(f"the answer has rows of layer {layer}, which was not asked for")
        if first * self.shapes[layer][-1] != have or have + nbytes > size:
            raise ProtocolError(
                f"layer {layer}: {nbytes} bytes at row {first} do not follow the {have} bytes "
                f"that came before; {size} were asked for"
            )
        array = self._arrays.get(layer)
        if array is None:
            array = self._arrays[layer] = self._allocate(size)
        return array[have : have + nbytes].data

    def have(self, layer: int) -> int:
        """How many bytes of the layer are there."""
        return self._have[layer]

    def places(self, layer: int) -> Places | None:
        """Where the layer's rows belong in the end, if not in `array`, in order."""
        return None

    def by_places(self, layer: int) -> Places | None:
        """As `places`. If there are any, all of the layer's rows are to be written there, and within `writing`."""
        places = self.places(layer)
        if places is not None:
            self.placed.add(layer)
            self.owned = False
        return places

    def received(self, layer: int, nbytes: int) -> None:
        """Count `nbytes` as there."""
        have = self._have[layer] = self._have[layer] + nbytes
        if nbytes > 0 and have == self.sizes[layer]:
            self.ready.append(layer)

    def copy_in(self, layer: int, first: int, data: memoryview) -> None:
        """Take in the next rows of a layer, which lie in memory that nobody will change. Raises as `destination`."""
        nbytes = len(data)
        if layer not in self._arrays and nbytes == self.sizes.get(layer) and first == 0 and not self._have[layer]:
            self._arrays[layer] = np.frombuffer(data, np.uint8)  # the whole table in one message: a view of it
        else:
            self.destination(layer, first, nbytes)[:] = data
        self.received(layer, nbytes)

    def hand_over(self) -> None:
        """Let the delivery have the layers that came to be complete, each once. Not within `delivery.writing`."""
        if self.ready:
            ready, self.ready = self.ready, []
            self._hand_over(ready)

    def forget_incomplete(self) -> list[int]:
        """Begin anew with the layers that are not complete, and give them: those that are may be in use already."""
        missing = [layer for layer, size in self.sizes.items() if self._have[layer] != size]
        self._have.update(dict.fromkeys(missing, 0))
        self.placed.difference_update(missing)
        return missing

    def check_complete(self) -> None:
        """Raise ProtocolError unless every row has come."""
        if self._have != self.sizes:
            short = next(layer for layer, size in self.sizes.items() if self._have[layer] != size)
            raise ProtocolError(f"the answer ended before the rows of layer {short} were complete")

    def array(self, layer: int) -> Rows:
        """The layer's bytes, uint8 [size]."""
        array = self._arrays.get(layer)
        if array is None:
            array = self._arrays[layer] = self._allocate(self.sizes[layer])
        return array

    def expect_parts(self, parts: "Sequence[Landing]") -> None:
        """Have this one's rows come by `parts`, which are to tell `part_complete`."""
        self._lock = threading.Lock()
        self._parts_left = {layer: sum(part.sizes.get(layer, 0) > 0 for part in parts) for layer in self.sizes}
        self.placed.update(layer for layer in self.sizes if self.places(layer) is not None)

    def part_complete(self, layer: int) -> None:
        """Count a part that has all its rows of a layer. Any thread."""
        with self._lock:
            self._parts_left[layer] -= 1
            if self._parts_left[layer]:
                return
            # Not to be asked for again, whatever becomes of the other layers.
            self._have[layer] = self.sizes[layer]
        self._hand_over([layer])

    def _allocate(self, nbytes: int) -> Rows:
        return np.empty(nbytes, np.uint8)

    def _hand_over(self, layers: Sequence[int]) -> None:
        rows = {}
        for layer in layers:
            rows[layer] = self._rows(layer)
        self.delivery.arrived(rows)

    def _rows(self, layer: int) -> Rows:
        """What a caller gets of a layer that is complete."""
        rows = self._arrays[layer].reshape(self.shapes[layer])  # a view
        rows.flags.writeable = False
        return rows


class CallersLanding(Landing):
    """Rows that go to a caller as they were asked for: into `out` where there is something. Raises BatchError."""

    def __init__(self, delivery: Delivery, shapes: Mapping[int, tuple[int, ...]], spec: ModelSpec, out: Out) -> None:
        if check_outs(spec, out, shapes):
            raise BatchError("out must be C-contiguous where rows are written as they come")
        super().__init__(
            delivery, shapes, {layer: given for layer, given in out.items() if isinstance(given, np.ndarray)}
        )
        self._spec, self._out = spec, out

    def _rows(self, layer: int) -> Rows:
        given, rows = self._out.get(layer), self.array(layer).reshape(self.shapes[layer])
        if isinstance(given, np.ndarray):
            return given
        if given is not None:
            with self.delivery.writing():
                return hand_over(self._spec.table(layer), rows, given)
        return read_only(rows)


class PartLanding(Landing):
    """Some of the rows of another one.

    where: layer -> where its rows stand among those of `whole`: a slice if they stand together, else their positions.
    """

    def __init__(self, whole: Landing, where: Mapping[int, "slice | npt.NDArray[np.int64]"]) -> None:
        shapes, given = {}, {}
        self._whole, self._places = whole, {}
        for layer, at in where.items():
            row_bytes, places = whole.shapes[layer][-1], whole.places(layer)
            if places is None:
                rows = whole.array(layer).reshape(-1, row_bytes)  # there before threads write to it
                if isinstance(at, slice):
                    given[layer] = rows[at]
                else:
                    self._places[layer] = Places(rows, at, 1)
            else:
                self._places[layer] = places.of(at)
            shapes[layer] = (at.stop - at.start if isinstance(at, slice) else len(at), row_bytes)
        super().__init__(whole.delivery, shapes, given)

    def places(self, layer: int) -> Places | None:
        """As of `Landing`."""
        return self._places.get(layer)

    def _hand_over(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not self.sizes[layer]:
                continue
            if layer in self._places and layer not in self.placed:
                with self.delivery.writing():
                    self._places[layer].put(self.array(layer).reshape(self.shapes[layer]))
            self._whole.part_complete(layer)


def by_layer(name: str, given: Any) -> Mapping[int, Any]:
    """What is given by layer. Raises BatchError for what is no mapping."""
    if not isinstance(given, dict | Mapping):
        raise BatchError(f"{name} must be a dict of arrays by layer; it is {type(given).__name__}")
    return given


class Finishing:
    """The last word on a lookup's rows, as its caller wants them.

    out: the caller's arrays. apart: those of `out` that rows are copied to, as they do not lie in order there.
    valid: layer -> bool [T], where it is written which tokens have their rows. holes: layer -> bool [*ids.shape], rows
    that there are not, once it is known: zeros.
    """

    def __init__(
        self,
        spec: ModelSpec,
        out: Out | None,
        apart: Mapping[int, Rows],
        valid: Mapping[int, Valid] | None,
        holes: Mapping[int, npt.NDArray[np.bool_]],
    ) -> None:
        self._spec, self._out, self._apart, self._valid, self._holes = spec, out or {}, apart, valid or {}, holes

    def finish(self, layer: int, rows: Rows, valid: Valid | None) -> Rows:
        """As `Finisher` says."""
        holes, out = self._holes.get(layer), self._out.get(layer)
        if holes is not None:
            rows = self._punch(layer, rows, holes, out)
        if layer in self._apart:
            self._apart[layer][...] = rows
            rows = self._apart[layer]
        if layer in self._valid:
            self._valid[layer][...] = True if valid is None else valid
        return rows

    def failed(self, layer: int) -> None:
        """As `Finisher` says."""
        if layer in self._valid:
            self._valid[layer][...] = False

    def _punch(
        self, layer: int, rows: Rows, holes: npt.NDArray[np.bool_], out: Rows | Mapping[str, Rows] | None
    ) -> Rows:
        if isinstance(out, Mapping):
            for array in out.values():
                array[holes] = 0
        ours = layer in self._apart or not isinstance(out, np.ndarray)
        if not rows.flags.writeable:
            try:
                rows.flags.writeable = True
            except ValueError:  # a message's own memory
                rows = rows.copy()
        rows[holes] = 0
        return read_only(rows) if ours else rows


def check_outs(spec: ModelSpec, out: Out | None, shapes: Mapping[int, tuple[int, ...]]) -> Mapping[int, Rows]:
    """Those that rows are to be copied to, as they are not C-contiguous.

    Raises BatchError for arrays that the rows of `shapes` cannot be written into, or that share memory.
    """
    if out is None or _are_good(out, shapes):
        return _NONE
    arrays: list[tuple[str, Rows]] = []
    for layer, given in by_layer("out", out).items():
        if layer not in shapes:
            raise BatchError(f"out has an array for layer {layer}, which is not asked for; {list(shapes)} are")
        shape = shapes[layer]
        if isinstance(given, np.ndarray) or not isinstance(given, Mapping):
            arrays.append(_check_out(f"layer {layer}", given, shape))
            continue
        row_format = spec.table(layer).row_format
        for name, array in given.items():
            cut = row_format.slice_of(name)
            arrays.append(_check_out(f"{name} of layer {layer}", array, (*shape[:-1], cut.stop - cut.start)))
    arrays.sort(key=lambda named: int(named[1].__array_interface__["data"][0]))
    for (one, array), (other, another) in combinations(arrays, 2):
        if _share_memory(array, another):
            raise BatchError(f"out of {one} and out of {other} share memory; give each an array of its own")
    return {
        layer: given for layer, given in out.items() if isinstance(given, np.ndarray) and not given.flags.c_contiguous
    }


def check_valid(valid: Mapping[int, Valid], shapes: Mapping[int, tuple[int, ...]], out: Out | None) -> None:
    """Raise BatchError for arrays that flags of tokens cannot be written into, or that share memory, or with `out`."""
    named: list[tuple[str, npt.NDArray[Any]]] = []
    for layer, given in (out or {}).items():
        arrays = {"": given} if isinstance(given, np.ndarray) else given
        named += [(f"out of {name} of layer {layer}".replace("of  ", ""), array) for name, array in arrays.items()]
    for layer, array in by_layer("valid", valid).items():
        if layer not in shapes:
            raise BatchError(f"valid has an array for layer {layer}, which is not asked for; {list(shapes)} are")
        shape = valid_shape(shapes[layer])
        if not isinstance(array, np.ndarray) or array.dtype != np.bool_ or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise BatchError(f"valid of layer {layer} must be a bool array {list(shape)}; it is {found}")
        if not array.flags.writeable:
            raise BatchError(f"valid of layer {layer} must be writable")
        _check_strides(f"valid of layer {layer}", array)
        for other, another in named:
            if _share_memory(array, another):
                raise BatchError(f"valid of layer {layer} and {other} share memory; give each an array of its own")
        named.append((f"valid of layer {layer}", array))


def valid_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What has one flag for each token of a layer whose rows have this shape."""
    return shape[:-2] if len(shape) > 2 else shape[:1]


def _share_memory(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether they do, or it takes long to tell."""
    try:
        return np.may_share_memory(one, other) and np.shares_memory(one, other, max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return True


def _are_good(out: Any, shapes: Mapping[int, tuple[int, ...]]) -> bool:
    """Whether they are whole arrays that own their memory, as nearly always, and so share none: found in few steps."""
    if type(out) is not dict:
        return False
    for layer, array in out.items():
        if type(array) is not np.ndarray or array.dtype is not _UINT8 or array.shape != shapes.get(layer):
            return False
        flags = array.flags
        if not (flags.owndata and flags.c_contiguous and flags.writeable):
            return False
    return len(set(map(id, out.values()))) == len(out)


def _check_out(what: str, array: Any, shape: tuple[int, ...]) -> tuple[str, Rows]:
    """The two. Raises BatchError."""
    if not isinstance(array, np.ndarray) or array.dtype != _UINT8 or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise BatchError(f"out of {what} must be a uint8 array {list(shape)}; it is {found}")
    if not array.flags.writeable:
        raise BatchError(f"out of {what} must be writable")
    _check_strides(f"out of {what}", array)
    return what, array


def _check_strides(what: str, array: npt.NDArray[Any]) -> None:
    """Raise BatchError for an array of single bytes of which some are in more than one place."""
    if array.flags.c_contiguous:
        return
    reach = 1  # one past the furthest byte of the dimensions of smaller strides
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True)):
        if n > 1 and stride < reach:
            raise BatchError(f"{what} overlaps itself: its strides are {list(array.strides)}")
        reach += stride * max(0, n - 1)


def hand_over(table: TableSpec, rows: Rows, out: Rows | Mapping[str, Rows] | None) -> Rows:
    """What a caller who gave `out` for a layer gets of its rows: the array itself; else a view that is read-only.

    Where the caller wants segments apart, they are copied to their arrays.
    """
    if isinstance(out, np.ndarray):
        return rows
    if out is not None:
        for name, array in out.items():
            array[:] = rows[..., table.row_format.slice_of(name)]
    return read_only(rows)


def read_only(rows: Rows) -> Rows:
    """A view that nobody may write to; what is ours stays writable, as rows that come too late are masked."""
    handed = rows.view()
    handed.flags.writeable = False
    return handed


def zeros(shapes: Mapping[int, tuple[int, ...]], out: Out | None) -> Blank:
    """Zero rows of no token, in the caller's arrays where there are some. shapes: of each layer's rows."""

    def blank(layer: int) -> tuple[Rows, Valid]:
        shape, given = shapes[layer], (out or {}).get(layer)
        if isinstance(given, Mapping):
            for array in given.values():
                array[:] = 0
        elif given is not None:
            given[:] = 0
        rows = given if isinstance(given, np.ndarray) else np.zeros(shape, np.uint8)
        if rows is not given:
            rows.flags.writeable = False
        return rows, np.zeros(valid_shape(shape), np.bool_)

    return blank
