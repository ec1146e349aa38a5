"""What each session takes in the ledger, for the quota of its owner."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("sessions", sa.Column("size_bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.execute(
        "UPDATE sessions SET size_bytes = 512"
        " + length(CAST(tags AS TEXT)) + length(CAST(user_metadata AS TEXT))"
    )
    op.create_index("sessions_by_size", "sessions", ["owner", "finished_at", "size_bytes"])
