"""Requests for rows by id, of models that only a specification is needed of."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engrampool_client.compute.forms import NUMPY
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import CallersLanding, Landing
from engrampool_client.lookup.query import RowQuery


def exchange_of(
    served: ServedModel, rows: Mapping[int, Any], out: Any = None, delivery: Delivery | None = None
) -> Exchange:
    """Ask for rows by id: layer -> what may be made an array."""
    query = RowQuery(served.spec, {layer: np.asarray(ids) for layer, ids in rows.items()})
    layout, delivery = Layout(served.spec, None), delivery or Delivery(sorted(rows))
    shapes = query.shapes(layout)
    landing = CallersLanding(delivery, shapes, served.spec, out) if out else Landing(delivery, shapes)
    return Exchange.of_ids(served, query.ids(layout, NUMPY.hashing(served.spec)), landing)


def add(taken: Exchange, answer: bytes) -> list[int]:
    """Layers that are handed over by a message."""
    had = set(taken.delivery.rows)
    taken.add(answer)
    taken.landing.hand_over()
    return sorted(set(taken.delivery.rows) - had)
