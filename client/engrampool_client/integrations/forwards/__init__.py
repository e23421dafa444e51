"""What adapters of engines have in common: tokens of requests, rows fetched early, one outcome for all ranks."""
