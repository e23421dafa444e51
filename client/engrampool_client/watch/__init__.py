"""Looking at a pool from outside, over gRPC: `engrampool status` and `engrampool top`."""
