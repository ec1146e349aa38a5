"""The size of answers, by age, so that old ones can be dropped; the snapshot before the newest."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("operations", sa.Column("answer_bytes", sa.BigInteger))
    op.execute("UPDATE operations SET answer_bytes = length(answer) WHERE answer IS NOT NULL")
    op.execute(
        "UPDATE operations SET finished_at = accepted_at WHERE finished_at IS NULL AND state <> 'accepted'"
    )
    op.create_index("operations_by_age", "operations", ["finished_at", "answer_bytes"])
    op.add_column("models", sa.Column("older_snapshot", sa.Text))
    op.add_column("models", sa.Column("older_snapshot_seq", sa.BigInteger))
