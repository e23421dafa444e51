"""Versions of models and servers that hold them, as a registry keeps them."""
