"""A client in the place of a real one, whose answers are right, and come when a test says so, or not at all."""

import threading
from contextlib import suppress
from types import SimpleNamespace

import numpy as np

from engrampool_client import StepCancelledError, UnavailableError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.step import Step
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S


class Scripted:
    """A client whose answers come as `fate` says of each: "now", "late" (in any order), "lost", "never"."""

    def __init__(self, spec, fate, seed=0):
        self.spec, self._fate, self._random = spec, fate, np.random.default_rng(seed)
        self.asked, self._late, self._ended = [], [], False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._answer_late)
        self._thread.start()

    def prefetch(self, tokens, bounds, lookback, dead, lookback_dead, *, out, layers, timeout_s, ahead=False):
        batch = TokenBatch.of(tokens, bounds, lookback, dead, lookback_dead)
        delivery, fate = Delivery(tuple(layers)), self._fate(len(self.asked), ahead)
        self.asked.append(SimpleNamespace(tokens=tokens.copy(), ahead=ahead, fate=fate, delivery=delivery))

        def answer():
            ids = self.spec.hash(batch, layers)
            with delivery.writing():
                for layer in layers:
                    out[layer][:] = rows_of(self.spec, layer, ids[layer])
            delivery.arrived({layer: out[layer] for layer in layers})
            delivery.end(None)

        if fate == "lost":
            delivery.end(UnavailableError("it was lost"))
        elif fate == "now":
            answer()
        elif fate == "late":
            with self._changed:
                self._late.append(answer)
                self._changed.notify()
        return Step(delivery)

    def _answer_late(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._late or self._ended)
                if self._ended:
                    return
                answer = self._late.pop(int(self._random.integers(len(self._late))))
            with suppress(StepCancelledError):  # it was given up meanwhile, and takes no rows
                answer()

    def close(self):
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(LIMIT_S)


def rows_of(spec, layer, ids):
    return synthetic_rows(spec.table(layer), ids.reshape(-1).astype(np.uint64)).reshape(*ids.shape, -1)
