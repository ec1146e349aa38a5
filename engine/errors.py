"""Errors that the engine tells its clients."""

from __future__ import annotations


class UserError(Exception):
    """The request was wrong. The message names what (datum index, field) and what would be right."""


class MissingWeights(UserError):
    """Sampler weights that are neither in memory nor on disk."""
