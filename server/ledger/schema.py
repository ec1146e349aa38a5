"""The tables. Times are seconds since 1970; every resource has an owner from the first day.

The migrations in `migrations/versions` make these; a test compares the two.
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
    Column("ledger", String(32), nullable=False),  # what tells this ledger from every other one
    Column("generation", BigInteger, nullable=False),
    Column("holder", JSON),  # null: released, or never held
    Column("renewed_at", Float, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("quota", JSON),  # where it differs from the settings; null: nowhere
    Column("sync_quantization", JSON),  # of weights that are sent to inference servers; null: none
)

inference_endpoints = Table(
    "inference_endpoints",
    metadata,
    Column("owner", String(128), ForeignKey("tenants.id"), primary_key=True),
    Column("host", String(255), primary_key=True),
    Column("port", Integer, primary_key=True, autoincrement=False),
    Column("fields", JSON, nullable=False),  # what else the tenant said of it
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
    # What its row and those of its models and samplers take (tenancy.py).
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Index("sessions_by_size", "owner", "finished_at", "size_bytes"),
)

# What each base model's name stands for now: a digest of the weights and of their arithmetic.
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
    Column("base_digest", Text),  # of what that name stood for; null: not known
    Column("lora", JSON),  # null: full weights
    Column("optimizer", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("state", String(16), nullable=False),  # creating, ready, failed, finished
    Column("creation", LargeBinary, nullable=False),  # the CreateModel message
    # Operations up to here have been answered, or given up; the next one has the number after it.
    Column("executed_seq", BigInteger, nullable=False),
    # The newest saved training state, and the operation it was taken after.
    Column("snapshot", Text),
    Column("snapshot_seq", BigInteger, nullable=False),
    # What comes before it, in case that it cannot be read: another one, or (0, null) the creation. The ledger
    # has the operations after it.
    Column("older_snapshot", Text),
    Column("older_snapshot_seq", BigInteger),
    Column("dialect", String(16), nullable=False, server_default="tinker"),
    # What its client calls it, where clients choose: the newest model of that name is meant.
    Column("alias", String(192)),
    # A client that opens the model again numbers its operations from 1 again: 1 is the one after this.
    Column("seq_base", BigInteger, nullable=False, server_default="0"),
    # What of its creation the engine does not know: what steps take that say nothing, limits, run loggers.
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
    Column("base_digest", Text),  # as that of models
    Column("model_path", Text),
    Column("directory", Text),  # of the weights; null: the base model itself
    # The model whose newest inflight weights it samples, its directory moving with them; null: it stays.
    Column("follows", String(192), index=True),
    # Who draws its samples (messages.SamplingEngine); null: as the server is set.
    Column("sampling_engine", String(16)),
    # Of its clients, which number their samples apart from the first one's.
    Column("copies", Integer, nullable=False, server_default="0"),
    Column("created_at", Float, nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), ForeignKey("tenants.id"), nullable=False),
    # What makes two submits the same operation; null: nothing does.
    Column("natural_key", Text, unique=True),
    Column("kind", String(32), nullable=False),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    # The session of an uploaded loss or of a numbered sample; a sample's sampling session and number in it.
    Column("session_id", String(192)),
    Column("sampler_id", String(192)),
    Column("sample_number", BigInteger),
    Column("reply", JSON, nullable=False),  # the part of the answer that is known at the submit
    Column("dialect", String(16), nullable=False, server_default="tinker"),
    Column("state", String(16), nullable=False),  # accepted, done, failed, rejected
    # Where ledgers from before the first release have payloads; null: in the table below, if it is kept.
    Column("payload", LargeBinary),
    # The engine's Done or Failed; of operations that are not `accepted`, null: it was dropped (retention.py).
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

# Messages to the engine, kept while a replay may need them. Apart from the operations, whose rows change: a
# payload is written once. The large ones are in files (payloads.py), to which their rows point.
payloads = Table(
    "payloads",
    metadata,
    Column("operation_id", String(64), ForeignKey("operations.id"), primary_key=True),
    Column("model_id", String(192)),
    Column("seq_id", BigInteger),
    Column("size", BigInteger, nullable=False),
    Column("data", LargeBinary),  # of small ones
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
    Column("base_digest", Text),  # as that of models
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

# Models that the server trains (server/rlve): where each stands, and what its steps were like.
rlve_runs = Table(
    "rlve_runs",
    metadata,
    Column("model_id", String(192), ForeignKey("models.id"), primary_key=True),
    Column("state", String(16), nullable=False),  # running, stopping, stopped, finished, failed
    Column("step", Integer, nullable=False),  # those that were counted
    Column("attempt", Integer, nullable=False),  # at the next one, from 0
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

# What a tenant's operations used: one row per hour (of 3600 s since 1970), session, training run and base
# model, added to when an operation is answered. Empty ids: of none, or unknown.
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
    ),  # the seq_id; of reported ones the step
    Column("step", BigInteger),  # that an optim_step made, or that was reported
    Column("at", Float, nullable=False),
    Column("size", Integer, nullable=False),  # of the metrics, in bytes of JSON
    Column("metrics", JSON, nullable=False),
)

# What was done by a tenant's keys. No prompts, no metadata of clients, no secrets.
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
