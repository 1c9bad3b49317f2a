"""Verbs on collections."""

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.db.tables import Collection, Image, Run, Upload
from app.errors import Conflict, not_found
from app.services import pages

OPEN_STATES = ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class CollectionView:
    id: uuid.UUID
    name: str
    created_at: datetime
    images: int


def create(session: Session, name: str) -> CollectionView:
    collection = Collection(id=uuid.uuid4(), name=name)
    session.add(collection)
    session.flush()
    return CollectionView(id=collection.id, name=name, created_at=collection.created_at, images=0)


def get(session: Session, collection_id: uuid.UUID) -> CollectionView:
    collection = session.get(Collection, collection_id)
    if collection is None:
        raise not_found("collection", collection_id)
    return _views(session, [collection])[0]


def lock(session: Session, collection_id: uuid.UUID) -> Collection:
    """The row, locked until the transaction ends, so that uploads, runs and deletion take turns."""
    collection = session.get(Collection, collection_id, with_for_update=True)
    if collection is None:
        raise not_found("collection", collection_id)
    return collection


def list_page(session: Session, limit: int, cursor: str | None) -> pages.Page[CollectionView]:
    """Newest first."""
    found = pages.newest_first(session, Collection, limit, cursor)
    return pages.Page(_views(session, found.items), found.next)


def remove(session: Session, collection_id: uuid.UUID) -> list[uuid.UUID]:
    """Delete a collection with all that belongs to it; the ids of its runs, whose files are to go too."""
    lock(session, collection_id)
    for table, noun, what in (
        (Upload, "an upload", "wait for its end"),
        (Run, "a run", "wait for its end or cancel it"),
    ):
        busy = session.scalar(
            select(table.id).where(table.collection_id == collection_id, table.state.in_(OPEN_STATES)).limit(1)
        )
        if busy is not None:
            raise Conflict(
                f"The collection has {noun} under way ({busy}); {what} first.",
                code="collection-busy",
            )
    runs = list(session.scalars(select(Run.id).where(Run.collection_id == collection_id)))
    session.execute(delete(Collection).where(Collection.id == collection_id))
    return runs


def _views(session: Session, rows: list[Collection]) -> list[CollectionView]:
    images = session.execute(
        select(Image.collection_id, func.count())
        .where(Image.collection_id.in_([row.id for row in rows]))
        .group_by(Image.collection_id)
    )
    counts: dict[uuid.UUID, int] = dict(images.all())
    return [
        CollectionView(id=row.id, name=row.name, created_at=row.created_at, images=counts.get(row.id, 0))
        for row in rows
    ]
