"""Tinsmith: a JAX/Flax training server for clients of the Tinker API."""

__version__ = "0.1.0"
