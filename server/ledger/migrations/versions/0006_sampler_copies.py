"""Sampling sessions count the copies of their clients."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("samplers", sa.Column("copies", sa.Integer, nullable=False, server_default="0"))
