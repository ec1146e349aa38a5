"""Tables of the ledger. Times are seconds since 1970.

The migrations in `migrations/versions` create these tables; a test compares the two.
"""

from __future__ import annotations

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
    text,
)

metadata = MetaData()

# One row: the server that owns the ledger (ownership.py).
lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("ledger", String(32), nullable=False),  # the id of this ledger
    Column("generation", BigInteger, nullable=False),
    Column("holder", JSON),  # null: released, or never held
    Column("renewed_at", Float, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("quota", JSON),  # differences from the settings; null: none
    Column("sync_quantization", JSON),  # of weights sent to inference servers; null: none
)

inference_endpoints = Table(
    "inference_endpoints",
    metadata,
    Column("owner", String(128), ForeignKey("tenants.id"), primary_key=True),
    Column("host", String(255), primary_key=True),
    Column("port", Integer, primary_key=True, autoincrement=False),
    Column("fields", JSON, nullable=False),  # the other fields of the tenant's request
    Column("created_at", Float, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("digest", LargeBinary, nullable=False),  # SHA-256 of the key
    Column("note", Text),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(192), primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("sdk_version", Text),
    Column("dialect", String(16), nullable=False, server_default="tinker"),
    Column("project_id", Text),
    Column("display_name", Text),
    Column("created_at", Float, nullable=False),
    Column("last_heartbeat_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_reason", String(32)),
    Column("finish_detail", Text),
    # The size of its row and those of its models and samplers (tenancy.py).
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Index("sessions_by_size", "owner", "finished_at", "size_bytes"),
)

# The weights that each base model's name stands for: a digest of them and of their arithmetic.
base_models = Table(
    "base_models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("served_at", Float, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("id", String(192), primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("session_id", String(192), ForeignKey("sessions.id"), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),  # of the base model at the creation; null: unknown
    Column("lora", JSON),  # null: full weights
    Column("optimizer", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("state", String(16), nullable=False),  # creating, ready, failed, finished
    Column("creation", LargeBinary, nullable=False),  # the CreateModel message
    # Operations up to this number have been answered or given up.
    Column("executed_seq", BigInteger, nullable=False),
    # The newest snapshot, and the operation after which it was taken.
    Column("snapshot", Text),
    Column("snapshot_seq", BigInteger, nullable=False),
    # The snapshot before it, in case it cannot be read, or (0, null) for the creation. The ledger
    # keeps the operations after it.
    Column("older_snapshot", Text),
    Column("older_snapshot_seq", BigInteger),
    Column("dialect", String(16), nullable=False, server_default="tinker"),
    # The name that its client chose, if clients choose; it means the newest model of that name.
    Column("alias", String(192)),
    # A client that opens the model again counts from 1; its operation 1 comes after this one.
    Column("seq_base", BigInteger, nullable=False, server_default="0"),
    # Parts of its creation for the server alone: defaults of steps, limits, run loggers.
    Column("configuration", JSON, nullable=False, server_default="{}"),
    Column("created_at", Float, nullable=False),
    Column("last_request_at", Float, nullable=False),
    Index("models_by_alias", "owner", "alias"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("id", String(192), primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("session_id", String(192), ForeignKey("sessions.id"), nullable=False, index=True),
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),  # as for models
    Column("model_path", Text),
    Column("directory", Text),  # of the weights; null: the base model
    # The model whose newest inflight weights it samples; its directory changes with them. Null: none.
    Column("follows", String(192), index=True),
    # Who draws its samples (messages.SamplingEngine); null: the server's default.
    Column("sampling_engine", String(16)),
    # Copies of its client, each of which numbers its samples separately.
    Column("copies", Integer, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False),
    # Equal for submits of the same operation; null: every submit is a new one.
    Column("natural_key", Text, unique=True),
    Column("kind", String(32), nullable=False),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    # The session of an uploaded loss or numbered sample; the sample's sampling session and its number.
    Column("session_id", String(192)),
    Column("sampler_id", String(192)),
    Column("sample_number", BigInteger),
    Column("reply", JSON, nullable=False),  # the part of the answer that is known at the submit
    Column("dialect", String(16), nullable=False, server_default="tinker"),
    Column("state", String(16), nullable=False),  # accepted, done, failed, rejected
    # The payload, in ledgers from before the first release; null: it is in the table below, if kept.
    Column("payload", LargeBinary),
    # The engine's Done or Failed. Null for operations that are not `accepted`: dropped (retention.py).
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

# Messages to the engine, kept while a replay may need them. Not in the rows of operations, which change: a
# payload is written once. Large ones are in files (payloads.py), to which their rows point.
payloads = Table(
    "payloads",
    metadata,
    Column("operation_id", String(64), ForeignKey("operations.id"), primary_key=True),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    Column("size", BigInteger, nullable=False),
    Column("data", LargeBinary),  # of small payloads
    Column("segment", String(64), key="file"),
    Column("position", BigInteger),
    Column("checksum", BigInteger),
    Index("payloads_of_model", "model_id", "seq_id"),
    Index("payloads_by_segment", "file"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("run_id", String(192), nullable=False),
    Column("segment", String(32), nullable=False),
    Column("name", String(128), nullable=False),
    Column("operation_id", String(64), nullable=False, index=True),
    Column("directory", Text, nullable=False, unique=True),
    Column("state", String(16), nullable=False),  # pending, complete, failed, deleted
    Column("base_model", Text, nullable=False),
    Column("base_digest", Text),  # as for models
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

# Models that the server trains (plugins/rlve): their progress, and the metrics of their steps.
rlve_runs = Table(
    "rlve_runs",
    metadata,
    Column("model_id", String(192), ForeignKey("models.id"), primary_key=True),
    Column("state", String(16), nullable=False),  # running, stopping, stopped, finished, failed
    Column("step", Integer, nullable=False),  # finished steps
    Column("attempt", Integer, nullable=False),  # at the next step, from 0
    Column("difficulties", JSON, nullable=False),  # by environment
    Column("message", Text),  # why it failed
    Column("updated_at", Float, nullable=False),
)

rlve_steps = Table(
    "rlve_steps",
    metadata,
    Column("model_id", String(192), ForeignKey("rlve_runs.model_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("metrics", JSON, nullable=False),
)

# Usage of a tenant's operations: one row per hour (of 3600 s since 1970), session, training run and base
# model. Answers of operations add to it. Empty ids: none, or unknown.
usage = Table(
    "usage",
    metadata,
    Column("owner", String(128), ForeignKey("tenants.id"), primary_key=True),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("session_id", String(192), primary_key=True),
    Column("run_id", String(192), primary_key=True),
    Column("base_model", Text, primary_key=True),
    Column("trained", BigInteger, nullable=False),  # tokens, as the next three
    Column("prefilled", BigInteger, nullable=False),
    Column("prefilled_cached", BigInteger, nullable=False),
    Column("sampled", BigInteger, nullable=False),
    Column("checkpoints", BigInteger, nullable=False),  # saved
    Index("usage_by_age", "hour"),
)

# One row per answered forward, forward_backward and optim_step of a model, and per step that a client or rlve
# reported (step_metrics.py). Old rows are thinned.
step_metrics = Table(
    "step_metrics",
    metadata,
    Column("model_id", String(192), ForeignKey("models.id", ondelete="CASCADE"), primary_key=True),
    # forward, forward_backward, optim_step; reported: from outside the engine
    Column("kind", String(16), primary_key=True),
    Column(
        "number", BigInteger, primary_key=True, autoincrement=False
    ),  # the seq_id; for reported ones the step
    Column("step", BigInteger),  # made by an optim_step, or reported
    Column("at", Float, nullable=False),
    Column("size", Integer, nullable=False),  # of the metrics: bytes of JSON
    Column("metrics", JSON, nullable=False),
)

# The audit log: actions with a tenant's keys, without prompts, clients' metadata and secrets.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False),
    Column("at", Float, nullable=False),
    Column("event", String(64), nullable=False),  # <resource>_<what was done>
    Column("details", JSON, nullable=False),
    Index("audit_of_owner", "owner", "at"),
    Index("audit_by_age", "at"),
)
