"""What a server says of itself: its log, its metrics, its progress."""
