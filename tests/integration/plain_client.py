"""A client that knows nothing of engrampool but pool.proto. Run in a child process beside the code generated from it.

Reads {"target", "model", "version", "calls"} as JSON on standard input and writes what each call gave as JSON.
"""

import json
import sys


class _NoEngrampool:
    """Refuses every import of ours: what is found here must come from pool.proto alone."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("engrampool"):
            raise ImportError(f"{name} was imported by a plain client")


sys.meta_path.insert(0, _NoEngrampool())

import grpc  # noqa: E402
import pool_pb2  # noqa: E402
import pool_pb2_grpc  # noqa: E402
from google.protobuf import json_format  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # noqa: E402
    ProtoReflectionDescriptorDatabase,
)


def main() -> None:
    job = json.load(sys.stdin)
    out = {}
    with grpc.insecure_channel(job["target"]) as channel:
        pool = pool_pb2_grpc.PoolStub(channel)
        described = pool.Describe(pool_pb2.DescribeRequest(include_spec=True))
        out["describe"] = json_format.MessageToDict(described, preserving_proto_field_name=True)
        names = {"model": described.models[0].name, "version": described.models[0].version}
        out["lookup"], out["stream"] = [], []
        for call in job["calls"]:
            request = json_format.ParseDict({**names, **call}, pool_pb2.LookupRequest())
            answer = pool.Lookup(request)
            out["lookup"].append([[t.layer, t.first, t.rows.hex()] for t in answer.tables])
            assert answer.times.HasField("total_us")
            messages = list(pool.LookupStream(request))
            assert [m.HasField("times") for m in messages] == [False] * (len(messages) - 1) + [True]
            out["stream"].append([[t.layer, t.first, t.rows.hex()] for m in messages for t in m.tables])
        out["refusal"] = refusal(pool)
        health = health_pb2_grpc.HealthStub(channel)
        out["health"] = {}
        for service in ("", "engrampool.v1.Pool"):
            request = health_pb2.HealthCheckRequest(service=service)
            watch = health.Watch(request)
            out["health"][service] = [health.Check(request).status, next(watch).status]
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="other")
        watch = health.Watch(unknown)
        out["health"]["other"] = [code_of(lambda: health.Check(unknown)), next(watch).status]
        watch.cancel()
        database = ProtoReflectionDescriptorDatabase(channel)
        out["services"] = list(database.get_services())
        found = database.FindFileContainingSymbol("engrampool.v1.Pool")
        out["methods"] = [[m.name, m.server_streaming] for s in found.service for m in s.method]
        out["same_contract"] = found.SerializeToString() == without_name(pool_pb2.DESCRIPTOR, found.name)
    out["imported"] = [name for name in sys.modules if name.startswith("engrampool")]
    json.dump(out, sys.stdout)


def without_name(descriptor, name: str) -> bytes:
    """The file's descriptor under the name that the server knows it by."""
    from google.protobuf import descriptor_pb2

    copy = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(copy)
    copy.name = name
    return copy.SerializeToString()


def code_of(call) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def refusal(pool) -> list:
    try:
        pool.Lookup(pool_pb2.LookupRequest(model="none"))
    except grpc.RpcError as error:
        return [error.code().name, dict(error.trailing_metadata()), error.details()]
    return []


if __name__ == "__main__":
    main()
