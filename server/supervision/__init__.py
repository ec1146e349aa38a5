"""The engine's process: its start, its death, and what waits to be sent to it."""
