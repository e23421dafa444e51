"""The direct lane: lookups over plain sockets."""
