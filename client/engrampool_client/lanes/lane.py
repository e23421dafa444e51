"""The interface of every way to one server. `engrampool_client.testing` has one without a server."""

from typing import Protocol

from engrampool_client.lookup.exchange import Exchange


class Request(Protocol):
    """A request under way. Exactly one of the two is to be called, once."""

    def receive(self) -> bool:
        """Take the whole answer in: rows go to the exchange's landing, layers are handed over as they are complete.

        False if the lane could not: what is missing is to be asked for by another one, and the exchange asks for no
        more than that. Raises PoolErrors; after one, layers that are complete stay so.
        """

    def abandon(self) -> None:
        """Do without the answer."""


class Lane(Protocol):
    """A way to one server. Thread-safe."""

    def ask(self, exchange: Exchange, deadline: float, *, spin_s: float = 0.0) -> Request | None:
        """Send the request, as far as that can be done at once; None if this lane is of no use for it now.

        deadline: by time.monotonic, for the whole answer. spin_s: how long to look for the answer without sleeping.
        """

    def forked(self) -> None:
        """In the child of a fork: let go of connections without a word, for they are the parent's."""

    def stop(self) -> None:
        """End what waits for the server, without waiting for that; `close` is to follow."""

    def close(self) -> None:
        """End the connections, and every request on one."""
