"""Answers are dropped by owner."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.create_index("answers_of_owner", "operations", ["owner", "finished_at", "answer_bytes"])
