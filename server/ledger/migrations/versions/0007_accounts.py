"""Tokens and checkpoints by the hour, and what was done by whom."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("session_id", sa.String(192), primary_key=True),
        sa.Column("run_id", sa.String(192), primary_key=True),
        sa.Column("base_model", sa.Text, primary_key=True),
        *(
            sa.Column(counter, sa.BigInteger, nullable=False)
            for counter in ("trained", "prefilled", "prefilled_cached", "sampled", "checkpoints")
        ),
    )
    op.create_index("usage_by_age", "usage", ["hour"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_index("audit_of_owner", "audit", ["owner", "at"])
    op.create_index("audit_by_age", "audit", ["at"])
