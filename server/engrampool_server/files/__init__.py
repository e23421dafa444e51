"""Packed models, checkpoints and object stores: read and written."""
