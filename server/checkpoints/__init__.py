"""Checkpoints on disk: their names, copies, archives, and cleanup."""
