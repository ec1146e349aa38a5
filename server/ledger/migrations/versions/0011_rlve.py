"""Training that the server runs itself: where it stands, and what its steps were like."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "rlve_runs",
        sa.Column("model_id", sa.String(192), sa.ForeignKey("models.id"), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("difficulties", sa.JSON, nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("updated_at", sa.Float, nullable=False),
    )
    op.create_table(
        "rlve_steps",
        sa.Column("model_id", sa.String(192), sa.ForeignKey("rlve_runs.model_id"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("metrics", sa.JSON, nullable=False),
    )
