"""What an engine's adapter counts: plain numbers, cheap enough for every forward; metrics.py shows them."""

from bisect import bisect_left
from collections.abc import Iterable

from engrampool_client.stats import WAIT_BOUNDS_S, Waits


class EngineCounts:
    """Of one worker.

    steps, tokens: forwards that needed rows, and their tokens. dummies: forwards that asked nobody.
    failed: forwards that ended by an error. masked, waits: by layer: tokens that went without rows on all ranks, and
    how long the engine waited. early: tokens whose rows were asked for before their forward, by what became of it.
    verified, differences: tokens whose row ids or rows were compared with the engine's own, and those that differed.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.steps = self.tokens = self.dummies = self.failed = self.verified = self.differences = 0
        self.waits = {layer: Waits() for layer in layers}
        self.masked = dict.fromkeys(self.waits, 0)
        self.early = {"served": 0, "thrown_away": 0}

    def waited(self, layer: int, seconds: float) -> None:
        """Count what the engine waited for a layer's rows, copies to the device not among it."""
        waits = self.waits[layer]
        waits.counts[bisect_left(WAIT_BOUNDS_S, seconds)] += 1
        waits.sum_s += seconds
