"""Answers to lookups: what one worker does with a request. Files are not read here."""
