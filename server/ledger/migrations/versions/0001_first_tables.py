"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(192), primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False, index=True),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("sdk_version", sa.Text),
        sa.Column("project_id", sa.Text),
        sa.Column("display_name", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("last_heartbeat_at", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("finish_detail", sa.Text),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.String(192), primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False, index=True),
        sa.Column("session_id", sa.String(192), sa.ForeignKey("sessions.id"), nullable=False, index=True),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON),
        sa.Column("optimizer", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("creation", sa.LargeBinary, nullable=False),
        sa.Column("executed_seq", sa.BigInteger, nullable=False),
        sa.Column("snapshot", sa.Text),
        sa.Column("snapshot_seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("last_request_at", sa.Float, nullable=False),
    )
    op.create_table(
        "samplers",
        sa.Column("id", sa.String(192), primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False, index=True),
        sa.Column("session_id", sa.String(192), sa.ForeignKey("sessions.id"), nullable=False, index=True),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("model_path", sa.Text),
        sa.Column("directory", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "operations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("natural_key", sa.Text, unique=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("model_id", sa.String(192)),
        sa.Column("seq_id", sa.BigInteger),
        sa.Column("reply", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("payload", sa.LargeBinary),
        sa.Column("answer", sa.LargeBinary),
        sa.Column("device_seconds", sa.Float),
        sa.Column("accepted_at", sa.Float, nullable=False),
        sa.Column("finished_at", sa.Float),
    )
    op.create_index("operations_of_model", "operations", ["model_id", "seq_id"])
    op.create_index("operations_in_state", "operations", ["state", "accepted_at"])
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.String(128), sa.ForeignKey("tenants.id"), nullable=False, index=True),
        sa.Column("run_id", sa.String(192), nullable=False),
        sa.Column("segment", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("operation_id", sa.String(64), nullable=False, index=True),
        sa.Column("directory", sa.Text, nullable=False, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON),
        sa.Column("optimizer", sa.JSON, nullable=False),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
    )
    op.create_index(
        "one_complete_checkpoint_per_name",
        "checkpoints",
        ["run_id", "segment", "name"],
        unique=True,
        sqlite_where=sa.text("state = 'complete'"),
        postgresql_where=sa.text("state = 'complete'"),
    )
