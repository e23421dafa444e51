"""Tables in memory: what fits, where they lie, how rows are gathered from them."""
