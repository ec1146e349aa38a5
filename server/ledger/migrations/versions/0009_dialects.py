"""Which dialect sessions, models and operations were asked for in; models by the names of their clients."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0007"


def upgrade() -> None:
    for table in ("sessions", "models", "operations"):
        op.add_column(table, sa.Column("dialect", sa.String(16), nullable=False, server_default="tinker"))
    op.add_column("models", sa.Column("alias", sa.String(192)))
    op.add_column("models", sa.Column("seq_base", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("models", sa.Column("configuration", sa.JSON, nullable=False, server_default="{}"))
    op.create_index("models_by_alias", "models", ["owner", "alias"])
