"""Generated protobuf and gRPC code of the contract's version 1 (see pool.proto; regenerate with `make stubs`)."""
