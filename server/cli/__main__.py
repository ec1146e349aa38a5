"""`python -m tinsmith.server.cli` is the command `tinsmith`."""

from . import app

app()
