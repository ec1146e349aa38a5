"""Checkpoints on disk: their names, copies, archives, and the room there is."""
