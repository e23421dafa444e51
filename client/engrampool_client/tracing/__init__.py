"""Lookups as spans of OpenTelemetry, where a client is asked for them."""
