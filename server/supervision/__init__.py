"""The engine's process: its start, its death, and how all goes on."""
