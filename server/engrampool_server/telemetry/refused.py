"""Lookups that were refused, in the log: under the number that the client has them by in its error."""

from collections.abc import Callable

from engrampool_server.telemetry import log
from engrampool_server.telemetry.told import Told

# A caller decides what is in some of these texts.
_MAX_TEXT = 200


class RefusedLookups:
    """Of one process. Thread-safe."""

    def __init__(self) -> None:
        self._told = Told()

    def note(self, method: str, peer: str, reason: str, text: str, number: Callable[[], int]) -> None:
        """Log one, unless another was within the second. number: gives the request's, 0 if it has none."""
        untold = self._told.due()
        if untold is not None:
            log.event(
                "refused",
                level="warning",
                request=f"{number():016x}",
                method=method,
                peer=peer,
                reason=reason,
                text=text[:_MAX_TEXT],
                untold=untold,
            )
