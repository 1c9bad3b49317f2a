"""The SQL of ingest: bulk rows by COPY, counts, resume, and the undoing of a failed upload."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Text, any_, delete, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from app.db.copy import insert_rows
from app.db.tables import Collection, Image, Run, Upload, UploadFile, UploadPart


@dataclass(frozen=True, kw_only=True)
class NewImage:
    id: uuid.UUID
    sha256: str
    filename: str
    format: str
    width: int
    height: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    position: int
    filename: str
    bytes: int
    outcome: str
    image_id: uuid.UUID | None = None
    reason_code: str | None = None
    reason: str | None = None


def parts(session: Session, upload_id: uuid.UUID) -> list[UploadPart]:
    return list(session.scalars(select(UploadPart).where(UploadPart.upload_id == upload_id).order_by(UploadPart.part)))


def counts(session: Session, upload_id: uuid.UUID) -> dict[str, int]:
    """Rows of the ledger by outcome."""
    found = session.execute(
        select(UploadFile.outcome, func.count()).where(UploadFile.upload_id == upload_id).group_by(UploadFile.outcome)
    )
    return {"accepted": 0, "duplicate": 0, "rejected": 0, **dict(found.all())}


def positions(session: Session, upload_id: uuid.UUID) -> set[int]:
    """What an interrupted ingest need not do again."""
    return set(session.scalars(select(UploadFile.position).where(UploadFile.upload_id == upload_id)))


def has_images(session: Session, collection_id: uuid.UUID) -> bool:
    return session.scalar(select(Image.id).where(Image.collection_id == collection_id).limit(1)) is not None


def known_images(session: Session, collection_id: uuid.UUID, sha256s: Iterable[str]) -> dict[str, uuid.UUID]:
    """Which of these contents the collection has, and as which image."""
    # One array, where `IN` would be a statement of a thousand parameters.
    wanted = any_(literal(list(sha256s), ARRAY(Text)))
    rows = session.execute(
        select(Image.sha256, Image.id).where(Image.collection_id == collection_id, Image.sha256 == wanted)
    )
    return dict(rows.all())


def add(
    session: Session,
    collection_id: uuid.UUID,
    upload_id: uuid.UUID,
    images: Sequence[NewImage],
    entries: Sequence[LedgerEntry],
) -> None:
    """Bulk-insert images, in the order given, and their ledger rows."""
    tenant_id = session.scalars(select(Collection.tenant_id).where(Collection.id == collection_id)).one()
    whose = (tenant_id, collection_id, upload_id)
    insert_rows(
        session,
        "COPY images (tenant_id, collection_id, upload_id, id, sha256, filename, format, width, height, bytes)"
        " FROM STDIN",
        ((*whose, i.id, i.sha256, i.filename, i.format, i.width, i.height, i.bytes) for i in images),
    )
    insert_rows(
        session,
        "COPY upload_files (upload_id, position, filename, bytes, outcome, image_id, reason_code, reason) FROM STDIN",
        ((upload_id, e.position, e.filename, e.bytes, e.outcome, e.image_id, e.reason_code, e.reason) for e in entries),
    )


def undo(session: Session, upload_id: uuid.UUID) -> list[str]:
    """Take back the images of an upload that fails; the ledger keeps what was rejected and why.

    Returns the SHA-256 of each image taken back, whose files are to go.
    """
    removed = session.scalars(delete(Image).where(Image.upload_id == upload_id).returning(Image.sha256)).all()
    session.execute(delete(UploadFile).where(UploadFile.upload_id == upload_id, UploadFile.outcome != "rejected"))
    return list(removed)


def forget_parts(session: Session, upload_id: uuid.UUID) -> None:
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))


def waiting_runs(session: Session, upload_id: uuid.UUID) -> list[uuid.UUID]:
    return list(session.scalars(select(Run.id).where(Run.upload_id == upload_id, Run.state == "queued")))


def next_upload(session: Session, collection_id: uuid.UUID) -> uuid.UUID | None:
    return session.scalar(
        select(Upload.id)
        .where(Upload.collection_id == collection_id, Upload.state == "queued")
        .order_by(Upload.created_at, Upload.id)
        .limit(1)
    )
