"""What an engine does with its requests, made up: chunks, prefix hits, drafts that are rejected, preempted requests."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Request:
    """tokens: all that are true of it so far. prompt: how many the engine was given when it was added last."""

    number: int
    tokens: list[int]
    left: int
    prompt: int = 0
    computed: int = 0


@dataclass
class Moment:
    """One step of an engine, in the order in which it tells of it. chunks: (number, start, tokens of it, drafts among
    them), and after the forward `sampled`: ids of each chunk's request, none of one whose prompt goes on."""

    removed: list[int] = field(default_factory=list)
    added: list[tuple[int, list[int], int]] = field(default_factory=list)
    chunks: list[tuple[int, int, list[int], int]] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers, starts and counts of the chunks."""
        return tuple(
            np.array(one, np.int64)
            for one in zip(*((number, start, len(tokens)) for number, start, tokens, _ in self.chunks), strict=True)
        )


def schedule(
    seed: int, vocab: int, *, numbers: int = 6, budget: int = 40, steps: int = 40, drafts: int = 0, longest: int = 90
) -> Iterator[tuple[Moment, dict[int, list[int]]]]:
    """Steps, and with each what is true of every request's tokens as its forward begins, its drafts included."""
    random = np.random.default_rng(seed)
    running: list[Request] = []
    waiting: list[Request] = []

    def words(count: int) -> list[int]:
        return random.integers(0, vocab if random.random() < 0.7 else 30, count).tolist()

    for _ in range(steps):
        moment, free = Moment(), set(range(numbers)) - {one.number for one in running}
        for one in list(running):
            done, preempted = one.left <= 0, random.random() < 0.04
            if done or preempted:
                running.remove(one)
                moment.removed.append(one.number)
                free.add(one.number)
                if not done:
                    waiting.append(one)
        room = budget
        for one in running:  # those that go on come first, as engines have it
            room = _chunk(one, moment, room, words, random, drafts)
        while free and room > 0 and random.random() < 0.7:
            fresh = Request(0, words(int(random.integers(1, longest))), int(random.integers(1, 12)))
            one = waiting.pop(0) if waiting and random.random() < 0.8 else fresh
            one.number = free.pop()
            # A prefix that the engine has, but for the last token.
            one.computed = int(random.integers(0, len(one.tokens))) if random.random() < 0.5 else 0
            one.prompt = len(one.tokens)
            moment.added.append((one.number, list(one.tokens), one.computed))
            running.append(one)
            room = _chunk(one, moment, room, words, random, 0)
        if not moment.chunks:
            continue
        truth = {one.number: list(one.tokens) for one in running}
        for number, start, tokens, _ in moment.chunks:
            truth[number][start:] = [*tokens, *truth[number][start + len(tokens) :]]
        yield moment, truth
        by_number = {one.number: one for one in running}
        for (number, start, tokens, tried), ids in zip(moment.chunks, moment.sampled, strict=True):
            one = by_number[number]
            one.computed = start + len(tokens) - tried + max(0, len(ids) - 1)
            one.tokens += ids
            one.left -= len(ids)


def _chunk(one, moment, room, words, random, drafts):
    """Schedule a request, in as many tokens as there is room for."""
    rest = len(one.tokens) - one.computed
    count = min(rest, room)
    if count <= 0:
        return room
    tried = 0
    tokens = one.tokens[one.computed : one.computed + count]
    if count == rest:  # it samples
        if one.computed >= one.prompt:
            tried = min(int(random.integers(0, drafts + 1)), room - count)
        guesses = words(tried)
        accepted = int(random.integers(0, tried + 1))
        moment.sampled.append([*guesses[:accepted], *words(1)])
        tokens = [*tokens, *guesses]
    else:
        moment.sampled.append([])
    moment.chunks.append((one.number, one.computed, tokens, tried))
    return room - len(tokens)
