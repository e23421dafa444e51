"""Ways to one server: each asks, and takes the answer in where its rows belong."""
