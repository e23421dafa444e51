"""One lookup, from a batch of tokens to its rows: no network in it."""
