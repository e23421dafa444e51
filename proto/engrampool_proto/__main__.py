"""`python -m engrampool_proto` is `engrampool`."""

from engrampool_proto.cli import main

main()
