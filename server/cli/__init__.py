"""The command `tinsmith`, and the process that serves."""

from .main import app

__all__ = ["app"]
