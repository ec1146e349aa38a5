"""Optimizers: one file per family of steps."""
