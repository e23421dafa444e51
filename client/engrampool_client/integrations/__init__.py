"""What takes rows into a framework or an engine. Nothing here is imported unless it is asked for by name."""
