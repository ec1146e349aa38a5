"""Payloads in a table of their own. A server moves older ones when it starts (operations/payloads.py)."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.create_table(
        "payloads",
        sa.Column("operation_id", sa.String(64), sa.ForeignKey("operations.id"), primary_key=True),
        sa.Column("model_id", sa.String(192)),
        sa.Column("seq_id", sa.BigInteger),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary),
        sa.Column("segment", sa.String(64)),
        sa.Column("position", sa.BigInteger),
        sa.Column("checksum", sa.BigInteger),
    )
    op.create_index("payloads_of_model", "payloads", ["model_id", "seq_id"])
    op.create_index("payloads_by_segment", "payloads", ["segment"])
