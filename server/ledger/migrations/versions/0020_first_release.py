"""The tables of the first release: made in an empty database, completed in a ledger from before that release.

They are written out here, because `schema.py` moves on with later migrations and this one must not.
"""

from __future__ import annotations

import uuid

from alembic import op
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
)
from tinsmith.server.ledger.migrations import complete

revision = "0020"
down_revision = None

tables = MetaData()


def _owner(index: bool = True) -> Column[str]:
    return Column("owner", String(128), ForeignKey("tenants.id"), nullable=False, index=index)


def _dialect() -> Column[str]:
    return Column("dialect", String(16), nullable=False, server_default="tinker")


lease = Table(
    "lease",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("ledger", String(32), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("holder", JSON),
    Column("renewed_at", Float, nullable=False),
)
Table(
    "tenants",
    tables,
    Column("id", String(128), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("quota", JSON),
    Column("sync_quantization", JSON),
)
Table(
    "inference_endpoints",
    tables,
    Column("owner", String(128), ForeignKey("tenants.id"), primary_key=True),
    Column("host", String(255), primary_key=True),
    Column("port", Integer, primary_key=True, autoincrement=False),
    Column("fields", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)
Table(
    "api_keys",
    tables,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("digest", LargeBinary, nullable=False),
    Column("note", Text),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)
Table(
    "sessions",
    tables,
    Column("id", String(192), primary_key=True),
    _owner(),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("sdk_version", Text),
    _dialect(),
    Column("project_id", Text),
    Column("display_name", Text),
    Column("created_at", Float, nullable=False),
    Column("last_heartbeat_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_reason", String(32)),
    Column("finish_detail", Text),
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Index("sessions_by_size", "owner", "finished_at", "size_bytes"),
)
Table(
    "base_models",
    tables,
    Column("name", Text, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("served_at", Float, nullable=False),
)
Table(
    "models",
    tables,
    Column("id", String(192), primary_key=True),
    _owner(),
    Column("session_id", String(192), ForeignKey("sessions.id"), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),
    Column("lora", JSON),
    Column("optimizer", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("creation", LargeBinary, nullable=False),
    Column("executed_seq", BigInteger, nullable=False),
    Column("snapshot", Text),
    Column("snapshot_seq", BigInteger, nullable=False),
    Column("older_snapshot", Text),
    Column("older_snapshot_seq", BigInteger),
    _dialect(),
    Column("alias", String(192)),
    Column("seq_base", BigInteger, nullable=False, server_default="0"),
    Column("configuration", JSON, nullable=False, server_default="{}"),
    Column("created_at", Float, nullable=False),
    Column("last_request_at", Float, nullable=False),
    Index("models_by_alias", "owner", "alias"),
)
Table(
    "samplers",
    tables,
    Column("id", String(192), primary_key=True),
    _owner(),
    Column("session_id", String(192), ForeignKey("sessions.id"), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),
    Column("model_path", Text),
    Column("directory", Text),
    Column("follows", String(192), index=True),
    Column("sampling_engine", String(16)),
    Column("copies", Integer, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
)
Table(
    "operations",
    tables,
    Column("id", String(64), primary_key=True),
    _owner(index=False),
    Column("natural_key", Text, unique=True),
    Column("kind", String(32), nullable=False),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    Column("session_id", String(192)),
    Column("sampler_id", String(192)),
    Column("sample_number", BigInteger),
    Column("reply", JSON, nullable=False),
    _dialect(),
    Column("state", String(16), nullable=False),
    Column("payload", LargeBinary),
    Column("answer", LargeBinary),
    Column("answer_bytes", BigInteger),
    Column("device_seconds", Float),
    Column("accepted_at", Float, nullable=False),
    Column("finished_at", Float),
    Index("operations_of_model", "model_id", "seq_id"),
    Index("operations_in_state", "state", "accepted_at"),
    Index("operations_by_age", "finished_at", "answer_bytes"),
    Index("answers_of_owner", "owner", "finished_at", "answer_bytes"),
    Index(
        "operations_of_session",
        "session_id",
        "kind",
        "sampler_id",
        sqlite_where=text("session_id IS NOT NULL"),
        postgresql_where=text("session_id IS NOT NULL"),
    ),
)
Table(
    "payloads",
    tables,
    Column("operation_id", String(64), ForeignKey("operations.id"), primary_key=True),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    Column("size", BigInteger, nullable=False),
    Column("data", LargeBinary),
    Column("segment", String(64)),
    Column("position", BigInteger),
    Column("checksum", BigInteger),
    Index("payloads_of_model", "model_id", "seq_id"),
    Index("payloads_by_segment", "segment"),
)
Table(
    "checkpoints",
    tables,
    Column("id", Integer, primary_key=True),
    _owner(),
    Column("run_id", String(192), nullable=False),
    Column("segment", String(32), nullable=False),
    Column("name", String(128), nullable=False),
    Column("operation_id", String(64), nullable=False, index=True),
    Column("directory", Text, nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),
    Column("lora", JSON),
    Column("optimizer", JSON, nullable=False),
    Column("size_bytes", BigInteger),
    Column("user_metadata", JSON),
    Column("public", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Index(
        "one_complete_checkpoint_per_name",
        "run_id",
        "segment",
        "name",
        unique=True,
        sqlite_where=text("state = 'complete'"),
        postgresql_where=text("state = 'complete'"),
    ),
)
Table(
    "rlve_runs",
    tables,
    Column("model_id", String(192), ForeignKey("models.id"), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("difficulties", JSON, nullable=False),
    Column("message", Text),
    Column("updated_at", Float, nullable=False),
)
Table(
    "rlve_steps",
    tables,
    Column("model_id", String(192), ForeignKey("rlve_runs.model_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("metrics", JSON, nullable=False),
)
Table(
    "usage",
    tables,
    Column("owner", String(128), ForeignKey("tenants.id"), primary_key=True),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("session_id", String(192), primary_key=True),
    Column("run_id", String(192), primary_key=True),
    Column("base_model", Text, primary_key=True),
    Column("trained", BigInteger, nullable=False),
    Column("prefilled", BigInteger, nullable=False),
    Column("prefilled_cached", BigInteger, nullable=False),
    Column("sampled", BigInteger, nullable=False),
    Column("checkpoints", BigInteger, nullable=False),
    Index("usage_by_age", "hour"),
)
Table(
    "audit",
    tables,
    Column("id", Integer, primary_key=True),
    _owner(index=False),
    Column("at", Float, nullable=False),
    Column("event", String(64), nullable=False),
    Column("details", JSON, nullable=False),
    Index("audit_of_owner", "owner", "at"),
    Index("audit_by_age", "at"),
)


def upgrade() -> None:
    connection = op.get_bind()
    existing = inspect(connection).get_table_names()
    tables.create_all(connection)
    complete(connection, [table for name, table in tables.tables.items() if name in existing])
    if connection.execute(select(lease.c.id)).first() is None:
        first = {"id": 1, "ledger": uuid.uuid4().hex, "generation": 0, "renewed_at": 0.0}
        connection.execute(insert(lease).values(first))
