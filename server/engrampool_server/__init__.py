"""The engrampool server: holds embedding tables in memory and answers lookups over gRPC."""
