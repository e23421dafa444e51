"""The systems that are measured, one in each file.

A module here has

- `missing() -> str | None`: why it cannot run on this machine, or None;
- `serve(workload)`: a context manager that runs in the server's process and gives the address to connect to (absent
  where there is no server);
- `connect(address, workload, tokens)`: a context manager that runs in the client's process and gives a function from a
  `Batch` to {layer: buffer of the rows' bytes, token-major}; `tokens` is the size of every batch. What the function
  returns may be overwritten by its next call.
"""

import importlib
import importlib.util
from types import ModuleType

# Name in the results -> module. The order is that of the tables.
SYSTEMS = {
    "engrampool-grpc": "engrampool_grpc",
    "engrampool-direct": "engrampool_direct",
    "engrampool-attach": "engrampool_attach",
    "raw-socket": "raw_socket",
    "raw-gather": "raw_gather",
    "numpy-take": "numpy_take",
    "torch-index-select": "torch_index_select",
    "arrow-flight": "arrow_flight",
    "hurried-grpc": "hurried_grpc",
    "redis": "redis_mget",
    "memcached": "memcached",
    "engramdb": "engramdb_binary",
    "mooncake-tcp": "mooncake_tcp",
    "grpc-empty": "grpc_empty",
    "grpc-raw": "grpc_raw",
}


def load(system: str) -> ModuleType:
    """The module of a system. Raises KeyError for a name that is not in SYSTEMS."""
    return importlib.import_module(f"peers.{SYSTEMS[system]}")


def not_installed(*modules: str) -> str | None:
    """What to tell of modules that are not installed, or None if all are."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
