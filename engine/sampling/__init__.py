"""Continuous batching: requests, their pages, and the programs that prefill and decode."""
