"""Is the server of this container serving? Exit code 0 if its gRPC health says so, else 1 and one line that says why.

Asks where ENGRAMPOOL_LISTEN points, as Docker's HEALTHCHECK runs it with the server's environment.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "engrampool.v1.Pool"
TIMEOUT_S = 4.0


def main() -> str | None:
    """What is wrong, if anything."""
    host, _, port = os.environ["ENGRAMPOOL_LISTEN"].rpartition(":")
    target = f"{'localhost' if host in ('0.0.0.0', '[::]') else host}:{port}"  # noqa: S104
    # A proxy for the way out is no way to this container.
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{target}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    return None


if __name__ == "__main__":
    sys.exit(main())
