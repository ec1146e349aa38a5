"""Which weights a base model's name stood for, and what was made on them."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.create_table(
        "base_models",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("served_at", sa.Float, nullable=False),
    )
    for table in ("models", "samplers", "checkpoints"):
        op.add_column(table, sa.Column("base_digest", sa.Text))
