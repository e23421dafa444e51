"""The server's side of one system, as a child of the harness: `serve.py SYSTEM WORKLOAD SETTINGS`.

Says {"address": ...} once it serves, and serves until its input ends.
"""

import json
import os
import sys
from pathlib import Path

import peers
from workload import Workload


def main() -> None:
    """Serve."""
    system, directory, settings = sys.argv[1:]
    # What a library prints must not get between the lines that the harness reads.
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workload = Workload(Path(directory))
    with peers.load(system).serve(workload, **json.loads(settings)) as address:
        said.write(json.dumps({"address": address}) + "\n")
        sys.stdin.read()


if __name__ == "__main__":
    main()
