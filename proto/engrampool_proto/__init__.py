"""The contract between engrampool's server and its clients: wire format, model specification and hash rules."""

__version__ = "0.1.0"
