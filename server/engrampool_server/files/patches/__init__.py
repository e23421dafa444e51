"""Versions that differ from another one by some rows."""
