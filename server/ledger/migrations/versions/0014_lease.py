"""The lease: which server owns the ledger."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    lease = op.create_table(
        "lease",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("ledger", sa.String(32), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.JSON),
        sa.Column("renewed_at", sa.Float, nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "ledger": uuid.uuid4().hex, "generation": 0, "renewed_at": 0.0}])
