"""The tables. Alembic's migrations build them; a test fails when the two differ."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
TERMINAL_STATES = ("succeeded", "failed", "cancelled")
OUTCOMES = ("accepted", "duplicate", "rejected")

SCOPES = ("read", "write", "admin")
# Whose everything is that was made before there were tenants, or without a key.
DEFAULT_TENANT = uuid.UUID(int=1)

# The API tells each transaction whose it is; what else writes, writes for the default tenant.
_THIS_TENANT = text(f"coalesce(nullif(current_setting('kindred.tenant', true), ''), '{DEFAULT_TENANT}')::uuid")

_STATE_RULE = "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')"


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own declaration
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB,
        str: Text,
        float: REAL,
    }


class Tenant(Table):
    """Who shares nothing with anybody else; row-level security keeps tenants apart (migration 0002).

    The nouns say whose they are, and a foreign key holds them to what their collection says. What belongs to an upload
    or a run is whose that is.
    """

    __tablename__ = "tenants"
    __table_args__ = (CheckConstraint("length(name) BETWEEN 1 AND 100", name="name_length"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Table):
    """A key: what finds it and what proves it, but not the key itself."""

    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint("length(name) BETWEEN 1 AND 100", name="name_length"),
        CheckConstraint("length(sha256) = 64", name="sha256"),
        CheckConstraint("scope IN ('read', 'write', 'admin')", name="scope"),
        Index("ix_api_keys_tenant_id_created_at", "tenant_id", "created_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), server_default=_THIS_TENANT
    )
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str]
    scope: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class WebSession(Table):
    """A browser that signed in with a key; its cookie holds a random value, and the row that value's SHA-256."""

    __tablename__ = "web_sessions"
    __table_args__ = (CheckConstraint("length(sha256) = 64", name="sha256"), Index("ix_web_sessions_key_id", "key_id"))

    sha256: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), server_default=_THIS_TENANT
    )
    key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]


class Collection(Table):
    __tablename__ = "collections"
    __table_args__ = (
        CheckConstraint("length(name) BETWEEN 1 AND 200", name="name_length"),
        UniqueConstraint("id", "tenant_id"),
        Index("ix_collections_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), server_default=_THIS_TENANT
    )
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


def _of_collection() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["collection_id", "tenant_id"], ["collections.id", "collections.tenant_id"], ondelete="CASCADE"
    )


class Job:
    """What uploads and runs share: a state machine with a lease, fenced by `attempt`."""

    state: Mapped[str] = mapped_column(server_default="queued")
    stage: Mapped[str | None]
    progress: Mapped[float] = mapped_column(server_default=text("0"))
    problem: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    lost_attempts: Mapped[int] = mapped_column(server_default=text("0"))
    lease_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


def _job_rules() -> tuple[CheckConstraint, ...]:
    return (
        CheckConstraint(_STATE_RULE, name="state"),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease_while_running"),
        CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished_at"
        ),
        CheckConstraint("(state = 'failed') = (problem IS NOT NULL)", name="problem_when_failed"),
        CheckConstraint("progress BETWEEN 0 AND 1", name="progress"),
    )


class Upload(Job, Table):
    __tablename__ = "uploads"
    __table_args__ = (
        *_job_rules(),
        _of_collection(),
        Index("ix_uploads_collection_id_created_at", "collection_id", "created_at"),
        Index("ix_uploads_open", "created_at", postgresql_where=text("state IN ('queued', 'running')")),
        # One ingest at a time in a collection: a duplicate always points to an image that is there to stay.
        Index(
            "uq_uploads_running_collection_id",
            "collection_id",
            unique=True,
            postgresql_where=text("state = 'running'"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(server_default=_THIS_TENANT)
    collection_id: Mapped[uuid.UUID]
    bytes: Mapped[int] = mapped_column(BigInteger)
    received: Mapped[int] = mapped_column(server_default=text("0"))
    accepted: Mapped[int] = mapped_column(server_default=text("0"))
    duplicate: Mapped[int] = mapped_column(server_default=text("0"))
    rejected: Mapped[int] = mapped_column(server_default=text("0"))
    ignored: Mapped[int] = mapped_column(server_default=text("0"))


class UploadPart(Table):
    """A file part of the request, as it arrived: an archive or one image. Gone once it is ingested."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)


class Image(Table):
    __tablename__ = "images"
    __table_args__ = (
        _of_collection(),
        UniqueConstraint("collection_id", "sha256"),
        Index("ix_images_collection_id_number", "collection_id", "number"),
        Index("ix_images_upload_id", "upload_id"),
        CheckConstraint("length(sha256) = 64", name="sha256"),
        CheckConstraint("width > 0 AND height > 0", name="size"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, Identity(always=True))
    tenant_id: Mapped[uuid.UUID] = mapped_column(server_default=_THIS_TENANT)
    collection_id: Mapped[uuid.UUID]
    upload_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"))
    sha256: Mapped[str]
    filename: Mapped[str]
    format: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class UploadFile(Table):
    """The ledger: a row for every file received."""

    __tablename__ = "upload_files"
    __table_args__ = (
        CheckConstraint("outcome IN ('accepted', 'duplicate', 'rejected')", name="outcome"),
        CheckConstraint("(outcome = 'rejected') = (reason IS NOT NULL)", name="reason_when_rejected"),
        CheckConstraint("(outcome = 'rejected') = (image_id IS NULL)", name="image_unless_rejected"),
        Index("ix_upload_files_image_id", "image_id"),
    )

    upload_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    outcome: Mapped[str]
    # The accepted image itself, or the one that a duplicate repeats.
    image_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"))
    reason_code: Mapped[str | None]
    reason: Mapped[str | None]


class Run(Job, Table):
    __tablename__ = "runs"
    __table_args__ = (
        *_job_rules(),
        _of_collection(),
        Index("ix_runs_collection_id_created_at", "collection_id", "created_at"),
        Index("ix_runs_tenant_id_state", "tenant_id", "state"),
        Index("ix_runs_open", "created_at", postgresql_where=text("state IN ('queued', 'running')")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(server_default=_THIS_TENANT)
    collection_id: Mapped[uuid.UUID]
    # The upload that a one-shot run waits for.
    upload_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("uploads.id", ondelete="SET NULL"))
    parameters: Mapped[dict[str, Any]]
    eta_s: Mapped[float | None]
    metrics: Mapped[dict[str, Any] | None]
    provenance: Mapped[dict[str, Any] | None]
    cancel_requested_at: Mapped[datetime | None]


class Cluster(Table):
    __tablename__ = "clusters"

    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    cluster: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    size: Mapped[int]
    confidence: Mapped[float | None]
    cohesion: Mapped[float | None]


class Representative(Table):
    __tablename__ = "representatives"
    __table_args__ = (
        ForeignKeyConstraint(["run_id", "cluster"], ["clusters.run_id", "clusters.cluster"], ondelete="CASCADE"),
        Index("ix_representatives_image_id", "image_id"),
    )

    run_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    cluster: Mapped[int] = mapped_column(primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    image_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"))


class Assignment(Table):
    __tablename__ = "assignments"
    __table_args__ = (
        ForeignKeyConstraint(["run_id", "cluster"], ["clusters.run_id", "clusters.cluster"], ondelete="CASCADE"),
        Index("ix_assignments_run_id_cluster_rank", "run_id", "cluster", "rank"),
        Index("ix_assignments_image_id", "image_id"),
        CheckConstraint("confidence BETWEEN 0 AND 1", name="confidence"),
    )

    run_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    # The image's place in the run's order, which is the order of the collection.
    position: Mapped[int] = mapped_column(primary_key=True)
    image_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"))
    cluster: Mapped[int]
    # 0 is the most typical image of its cluster.
    rank: Mapped[int]
    confidence: Mapped[float]
    runner_up: Mapped[int]
    margin: Mapped[float]
    consensus: Mapped[bool] = mapped_column(Boolean)


class IdempotencyKey(Table):
    """What a POST with an `Idempotency-Key` answered, so that sending it again creates nothing."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, server_default=_THIS_TENANT
    )
    key: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[str]
    status: Mapped[int]
    location: Mapped[str]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
