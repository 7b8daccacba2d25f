"""The tables, one schema for SQLite and PostgreSQL. Every row has the key's name that made it, and a place in time."""

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
    MetaData,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 1

metadata = MetaData()
Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only what is called INTEGER


def _place() -> Column[int]:
    """The order in which rows were made; `created_at` has whole seconds alone."""
    return Column("place", Big, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", String(64), unique=True, nullable=False)


def _owner() -> Column[str]:
    """Name of the key whose it is; empty on a server without keys."""
    return Column("owner", String(64), nullable=False)


def _time(name: str, *, nullable: bool = True) -> Column[int]:
    """Unix seconds."""
    return Column(name, BigInteger, nullable=nullable)


schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

files = Table(
    "files",
    metadata,
    _place(),
    _id(),
    _owner(),
    _time("created_at", nullable=False),
    _time("expires_at"),
    Column("bytes", BigInteger, nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
)

fine_tuning_jobs = Table(
    "fine_tuning_jobs",
    metadata,
    _place(),
    _id(),
    _owner(),
    _time("created_at", nullable=False),
    _time("finished_at"),
    _time("estimated_finish"),
    Column("status", String(32), nullable=False),
    Column("model", String(255), nullable=False),  # what it starts from, by its served name
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("suffix", String(64), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("method", JSON, nullable=False),  # as it was asked for, and is shown
    Column("hyperparameters", JSON, nullable=False),  # as they are shown
    Column("details", JSON(none_as_null=True)),  # metadata, a name that SQLAlchemy keeps for itself
    Column("fine_tuned_model", String(255)),
    Column("trained_tokens", BigInteger),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("runner", String(64)),  # which server trains it
    Column("lease_until", Float),  # unix seconds; after it another server may take it
    Index("fine_tuning_jobs_status", "status"),
)

fine_tuning_events = Table(
    "fine_tuning_events",
    metadata,
    _place(),
    _id(),
    Column("job_id", String(64), ForeignKey("fine_tuning_jobs.id", ondelete="CASCADE"), nullable=False),
    _time("created_at", nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Index("fine_tuning_events_job", "job_id", "place"),
)

fine_tuning_checkpoints = Table(
    "fine_tuning_checkpoints",
    metadata,
    _place(),
    _id(),
    Column("job_id", String(64), ForeignKey("fine_tuning_jobs.id", ondelete="CASCADE"), nullable=False),
    _time("created_at", nullable=False),
    Column("step_number", Integer, nullable=False),
    Column("name", String(255), nullable=False),  # of the model it is
    Column("metrics", JSON, nullable=False),
    Index("fine_tuning_checkpoints_job", "job_id", "place"),
)

fine_tuned_models = Table(
    "fine_tuned_models",
    metadata,
    _place(),
    Column("id", String(255), unique=True, nullable=False),  # the name it is served by
    _owner(),
    Column("job_id", String(64), nullable=False),
    _time("created_at", nullable=False),
    Column("directory", String(255), nullable=False),  # below the data directory
)

batches = Table(
    "batches",
    metadata,
    _place(),
    _id(),
    _owner(),
    Column("endpoint", String(64), nullable=False),
    Column("status", String(32), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("completion_window", String(16), nullable=False),
    Column("output_expires_after", BigInteger),  # seconds
    Column("details", JSON(none_as_null=True)),  # metadata
    Column("model", String(255)),  # of all its lines, if it is one
    Column("errors", JSON(none_as_null=True)),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    _time("created_at", nullable=False),
    *(
        _time(f"{word}_at")
        for word in (
            "in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
        )
    ),
    Column("runner", String(64)),
    Column("lease_until", Float),
    Index("batches_status", "status"),
)  # fmt: skip

# What came of the lines of a batch that has not ended; then they are files.
batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the line in the input, from 1
    Column("succeeded", Boolean, nullable=False),
    Column("output", Text, nullable=False),  # the line of the output or error file
)
