"""Samplers that follow their model's newest inflight weights."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("samplers", sa.Column("follows", sa.String(192)))
    op.create_index("ix_samplers_follows", "samplers", ["follows"])
