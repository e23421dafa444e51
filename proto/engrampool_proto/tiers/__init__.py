"""Memory that is not there: what is known of it, for those who emulate it."""
