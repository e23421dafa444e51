"""What a server holds, read once at connect: which model, which version, its specification and the server's limits."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from engrampool_client.errors import ProtocolError, UnknownModelError, UnknownVersionError
from engrampool_proto.errors import SpecError
from engrampool_proto.spec import ModelSpec
from engrampool_proto.v1 import pool_pb2

# A specification has some hundred kilobytes, so whoever asks many servers, or often, asks for its digest: `BRIEF`.
DESCRIBE = pool_pb2.DescribeRequest(include_spec=True).SerializeToString()
BRIEF = pool_pb2.DescribeRequest().SerializeToString()


@dataclass(frozen=True)
class ServedModel:
    """One version of one model on one server.

    max_rows, max_answer_bytes: the server's limits on a request. direct: whether it has a direct lane.
    attach: whether it has tables that a client on the same machine can map. emulates: the tier whose memory is
    emulated, "" for none.
    parts: layer -> (first row, one past the last) that the server holds; not those of which it holds none.
    """

    spec: ModelSpec
    version: str
    max_rows: int
    max_answer_bytes: int
    server_version: str
    direct: bool = False
    attach: bool = False
    parts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    emulates: str = ""


def read_spec(held: pool_pb2.Model) -> ModelSpec:
    """The specification of what a server holds, as it is sent along. Raises ProtocolError if it is not what it says."""
    try:
        spec = ModelSpec.from_json(json.loads(held.spec_json))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the server's specification of {held.name} is unreadable: {error}") from error
    if spec.digest != held.spec_digest:
        raise ProtocolError(
            f"the server's specification of {held.name} has digest {spec.digest}, not {held.spec_digest}"
        )
    return spec


def choose(
    answer: bytes,
    model: str | None,
    version: str | None,
    spec_of: Callable[[pool_pb2.Model], ModelSpec] = read_spec,
) -> ServedModel:
    """Pick a model from a DescribeResponse; None means the only one there is, of several versions the active one.

    spec_of: gives the specification of what was picked, where it was not sent along.
    Raises UnknownModelError or UnknownVersionError if there is none such, or several and none was named;
    ProtocolError if the answer contradicts itself; and what `spec_of` raises.
    """
    try:
        response = pool_pb2.DescribeResponse.FromString(answer)
    except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
        raise ProtocolError(f"Describe was answered with something else: {error}") from error
    names = sorted({held.name for held in response.models})
    if model is None and len(names) != 1:
        raise UnknownModelError(f"name the model: the server holds {', '.join(names) or 'none'}")
    of_name = [held for held in response.models if held.name == (model or names[0])]
    if not of_name:
        raise UnknownModelError(f"the server holds no model {model!r}; it holds {', '.join(names) or 'none'}")
    versions = [held.version for held in of_name]
    active = [held.version for held in of_name if held.active]
    if version is None and len(active) == 1:
        version = active[0]
    if version is None and len(versions) != 1:
        raise UnknownVersionError(f"name the version of {of_name[0].name}: the server holds {', '.join(versions)}")
    chosen = [held for held in of_name if held.version == (version or versions[0])]
    if not chosen:
        raise UnknownVersionError(f"the server holds {of_name[0].name} in {', '.join(versions)}, not in {version}")
    held = chosen[0]
    limits = response.limits
    return ServedModel(
        spec_of(held),
        held.version,
        limits.max_rows_per_request,
        limits.max_answer_bytes,
        response.server_version,
        response.direct,
        response.attach,
        {table.layer: (table.row_start, table.row_stop) for table in held.tables if table.row_start < table.row_stop},
        response.emulates,
    )


def merged(served: Iterable[ServedModel]) -> ServedModel:
    """What several servers hold of one version together. Raises SpecError if it is not one version."""
    first, *others = served
    for other in others:
        if (other.spec.name, other.version) != (first.spec.name, first.version):
            raise SpecError(
                f"servers hold {first.spec.name} {first.version} and {other.spec.name} {other.version}: name one"
            )
    if not others:
        return first
    # Replicas have one limit, the least; a request to several shards may have what each takes of its part. How that
    # spreads over them, only the request says: a part that is over its shard's limits is asked for in several pieces.
    shards: dict[frozenset[tuple[int, tuple[int, int]]], tuple[int, int]] = {}
    for one in (first, *others):
        key = frozenset(one.parts.items())
        max_rows, max_answer_bytes = shards.get(key, (one.max_rows, one.max_answer_bytes))
        shards[key] = min(max_rows, one.max_rows), min(max_answer_bytes, one.max_answer_bytes)
    every_rows, every_bytes = zip(*shards.values(), strict=True)
    return replace(first, max_rows=sum(every_rows), max_answer_bytes=sum(every_bytes), parts={})
