"""Who draws the samples of a sampling session."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("samplers", sa.Column("sampling_engine", sa.String(16)))
