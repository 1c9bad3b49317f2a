"""Verbs on uploads and their ledger."""

import uuid
from collections.abc import Generator
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.copy import csv_blocks
from app.db.tables import Upload, UploadFile, UploadPart
from app.errors import not_found
from app.services import collections, pages, quotas, tabular

_LEDGER_CSV = f"""
    SELECT position, {tabular.safe_sql("filename")} AS filename, bytes, outcome, image_id, reason_code,
           {tabular.safe_sql("reason")} AS reason
    FROM upload_files
    WHERE upload_id = %(upload_id)s
    ORDER BY position
"""  # noqa: S608 - of this file's own texts


@dataclass(frozen=True, kw_only=True)
class ReceivedPart:
    filename: str
    bytes: int


def create(session: Session, upload_id: uuid.UUID, collection_id: uuid.UUID, parts: list[ReceivedPart]) -> Upload:
    """Queue what was received; the files already lie under `storage.incoming(upload_id)`."""
    collection = collections.lock(session, collection_id)
    size = sum(part.bytes for part in parts)
    quotas.check_room(session, collection.tenant_id, size)
    upload = Upload(id=upload_id, collection_id=collection_id, bytes=size)
    session.add(upload)
    session.flush()
    session.add_all(
        UploadPart(upload_id=upload_id, part=number, filename=part.filename, bytes=part.bytes)
        for number, part in enumerate(parts)
    )
    session.flush()
    session.refresh(upload)
    return upload


def get(session: Session, upload_id: uuid.UUID) -> Upload:
    upload = session.get(Upload, upload_id)
    if upload is None:
        raise not_found("upload", upload_id)
    return upload


def list_page(session: Session, collection_id: uuid.UUID, limit: int, cursor: str | None) -> pages.Page[Upload]:
    """Newest first."""
    collections.get(session, collection_id)
    return pages.newest_first(session, Upload, limit, cursor, Upload.collection_id == collection_id)


def ledger_page(
    session: Session, upload_id: uuid.UUID, limit: int, cursor: str | None, outcome: str | None
) -> pages.Page[UploadFile]:
    get(session, upload_id)
    query = select(UploadFile).where(UploadFile.upload_id == upload_id).order_by(UploadFile.position).limit(limit + 1)
    after = pages.decode(cursor, pages.int32)
    if after is not None:
        query = query.where(UploadFile.position > after[0])
    if outcome is not None:
        query = query.where(UploadFile.outcome == outcome)
    return pages.page(session.scalars(query).all(), limit, lambda row: (row.position,))


def ledger_csv(session: Session, upload_id: uuid.UUID) -> Generator[bytes]:
    """What became of every file, in the order they came, at constant memory. Texts are safe for spreadsheets."""
    return csv_blocks(session, _LEDGER_CSV, {"upload_id": upload_id})


def is_open(session: Session, upload_id: uuid.UUID) -> bool:
    """Whether its files are still needed."""
    upload = session.get(Upload, upload_id)
    return upload is not None and upload.state in collections.OPEN_STATES
