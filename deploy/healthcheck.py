"""Is the server of this container serving? Exit code 0 if its gRPC health says so, else 1 and one line that says why.

Asks where ENGRAMPOOL_LISTEN points, as Docker's HEALTHCHECK runs it with the server's environment. With
ENGRAMPOOL_TLS_CERT it asks for /readyz where ENGRAMPOOL_METRICS points, which wants no certificate of whoever asks.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "engrampool.v1.Pool"
TIMEOUT_S = 4.0


def main() -> str | None:
    """What is wrong, if anything."""
    if os.environ.get("ENGRAMPOOL_TLS_CERT", "off") not in ("", "off"):
        return ready(reached("ENGRAMPOOL_METRICS"))
    target = reached("ENGRAMPOOL_LISTEN")
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


def reached(variable: str) -> str:
    """Where an address that is listened on is reached from here."""
    host, _, port = os.environ[variable].rpartition(":")
    return f"{'localhost' if host in ('0.0.0.0', '[::]') else host}:{port}"  # noqa: S104


def ready(target: str) -> str | None:
    """What is wrong by /readyz, if anything. Whose certificate it is does not matter: nothing secret is sent."""
    scheme = "http" if os.environ.get("ENGRAMPOOL_TLS_METRICS", "true").lower() in ("false", "0") else "https"
    context = ssl._create_unverified_context()  # noqa: S323
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"{scheme}://{target}/readyz", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"{target}: {error.read().decode().strip()}"
    except OSError as error:
        return f"{target}: {error}"


if __name__ == "__main__":
    sys.exit(main())
