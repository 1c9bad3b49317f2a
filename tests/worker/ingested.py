"""Uploads that wait for their ingest, and what it made of them."""

import threading
import uuid

from sqlalchemy import select

from app import storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Image, Upload, UploadFile
from app.services import collections, uploads
from app.services.uploads import ReceivedPart
from worker.ingest import ingest


def queued(*parts: tuple[str, bytes], collection_id: uuid.UUID | None = None) -> uuid.UUID:
    upload_id = uuid.uuid4()
    storage.incoming(upload_id).mkdir(parents=True)
    for number, (_, content) in enumerate(parts):
        storage.incoming_part(upload_id, number).write_bytes(content)
    with open_session() as session:
        target = collection_id or collections.create(session, "test").id
        session.flush()
        received = [ReceivedPart(filename=name, bytes=len(content)) for name, content in parts]
        uploads.create(session, upload_id, target, received)
        session.commit()
    return upload_id


def run(upload_id: uuid.UUID) -> Upload:
    ingest(upload_id, threading.Event())
    return read(upload_id)


def read(upload_id: uuid.UUID) -> Upload:
    with open_session() as session:
        return uploads.get(session, upload_id)


def ledger(upload_id: uuid.UUID) -> list[tuple[str, str, str | None]]:
    with open_session() as session:
        rows = session.scalars(
            select(UploadFile).where(UploadFile.upload_id == upload_id).order_by(UploadFile.position)
        )
        return [(row.filename, row.outcome, row.reason_code) for row in rows]


def images() -> list[Image]:
    with open_session() as session:
        return list(session.scalars(select(Image).order_by(Image.number)))


def assert_files_match_rows() -> None:
    """Every row has its two files, and nothing else lies in the data folder."""
    expected = set()
    for image in images():
        expected |= {
            storage.original(image.collection_id, image.sha256),
            storage.thumbnail(image.collection_id, image.sha256),
        }
    assert {path for path in settings().data_dir.resolve().rglob("*") if path.is_file()} == expected
