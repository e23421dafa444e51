"""Where rows land, by PyTorch, does what tests of forwards take in its place; of a pretended GPU, what is issued."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
SHAPE = {1: (3, 8), 14: (2, 8)}


def landings():
    from engrampool_client.integrations.forwards.torch_landing import TorchLanding
    from landings import HostLanding

    yield HostLanding(SHAPE, 6)
    yield TorchLanding([1, 14], SHAPE, 6, torch.device("cpu"))


def test_every_landing_does_the_same():
    found = []
    for landing in landings():
        memory = landing.memory(10)
        assert {layer: (rows.shape, rows.dtype) for layer, rows in memory.items()} == {
            layer: ((10, *shape), np.uint8) for layer, shape in SHAPE.items()
        }
        mark = landing.event()
        assert mark.query()
        mark.synchronize()
        read = {layer: landing.landed(layer) for layer in SHAPE}  # the same memory from now on
        for layer, rows in memory.items():
            rows[:] = np.arange(rows.size, dtype=np.uint8).reshape(rows.shape) | 1
            landing.copy(layer, 4, 0, 6)
            landing.copy(layer, 0, 2, 1)
            landing.clear(layer, slice(5, 6))
            landing.clear(layer, np.array([0, 3]))
        mark.record()
        found.append(np.concatenate([np.asarray(read[layer]).reshape(-1) for layer in SHAPE]))
    np.testing.assert_array_equal(*found)


def test_of_a_gpu_the_hosts_memory_is_pinned_and_copies_do_not_wait(monkeypatch):
    from engrampool_client.integrations.forwards import torch_landing

    pinned, zeros, waits, copy = [], torch.zeros, [], torch.Tensor.copy_

    def made(*shape, device, pin_memory=False, **kind):
        pinned.append((str(device), pin_memory))
        return zeros(*shape, **kind)

    def copied(self, other, non_blocking=False):
        waits.append(non_blocking)
        return copy(self, other)

    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "Event", lambda: "an event")
    landing = torch_landing.TorchLanding([1, 14], SHAPE, 6, torch.device("cuda"))
    landing.memory(10)
    landing.copy(1, 0, 0, 2)
    assert landing.event() == "an event"
    assert pinned == [("cuda", False)] * 2 + [("cpu", True)] * 2
    assert waits == [True]
