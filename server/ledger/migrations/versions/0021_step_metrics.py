"""Add the table of step metrics."""

from __future__ import annotations

from alembic import op
from sqlalchemy import JSON, BigInteger, Column, Float, ForeignKey, Integer, String

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.create_table(
        "step_metrics",
        Column("model_id", String(192), ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
        Column("kind", String(16), primary_key=True),
        Column("number", BigInteger, primary_key=True, autoincrement=False),
        Column("step", BigInteger),
        Column("at", Float, nullable=False),
        Column("size", Integer, nullable=False),
        Column("metrics", JSON, nullable=False),
    )
