"""A landing of memory of the process, for tests of forwards that need no PyTorch."""

import threading

import numpy as np

LIMIT_S = 60
NOTHING = 0xEE  # what no row is made of


class Mark:
    """As an event of a GPU: what was issued until now has come once `reached` is set."""

    def __init__(self):
        self.reached, self.waited_for = threading.Event(), threading.Event()
        self.reached.set()

    def record(self):
        pass

    def query(self):
        return self.reached.is_set()

    def synchronize(self):
        self.waited_for.set()
        assert self.reached.wait(LIMIT_S)


class HostLanding:
    """See `Landing` (areas.py); tests/engines holds it and TorchLanding to the same.

    marks: every event that was made. copies: how many were issued.
    """

    def __init__(self, row_shape, max_tokens):
        self.layers, self.max_tokens, self.row_shape = tuple(row_shape), max_tokens, row_shape
        self.marks, self.copies, self.host = [], 0, {}
        self._landed = {layer: np.full((max_tokens, *shape), NOTHING, np.uint8) for layer, shape in row_shape.items()}

    def memory(self, tokens):
        self.host = {layer: np.full((tokens, *shape), NOTHING, np.uint8) for layer, shape in self.row_shape.items()}
        return self.host

    def event(self):
        self.marks.append(Mark())
        return self.marks[-1]

    def copy(self, layer, source, target, tokens):
        self.copies += 1
        self._landed[layer][target : target + tokens] = self.host[layer][source : source + tokens]

    def clear(self, layer, tokens):
        self._landed[layer][tokens] = 0

    def landed(self, layer):
        return self._landed[layer]
