"""Inference servers that tenants have named, and how weights are to be quantized for them."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "inference_endpoints",
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("port", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("fields", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.add_column("tenants", sa.Column("sync_quantization", sa.JSON))
