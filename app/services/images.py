"""Verbs on images."""

import uuid
from collections.abc import Sequence

from sqlalchemy import func, select, true
from sqlalchemy.orm import Session

from app.db.tables import Collection, Image
from app.errors import not_found
from app.services import collections, pages


def get(session: Session, image_id: uuid.UUID) -> Image:
    image = session.get(Image, image_id)
    if image is None:
        raise not_found("image", image_id)
    return image


def count(session: Session, collection_id: uuid.UUID) -> int:
    return session.scalar(select(func.count()).select_from(Image).where(Image.collection_id == collection_id)) or 0


def list_page(session: Session, collection_id: uuid.UUID, limit: int, cursor: str | None) -> pages.Page[Image]:
    """In the order of arrival."""
    collections.get(session, collection_id)
    query = select(Image).where(Image.collection_id == collection_id).order_by(Image.number).limit(limit + 1)
    after = pages.decode(cursor, pages.int64)
    if after is not None:
        query = query.where(Image.number > after[0])
    return pages.page(session.scalars(query).all(), limit, lambda row: (row.number,))


def sample(session: Session, collection_ids: Sequence[uuid.UUID], each: int) -> dict[uuid.UUID, list[uuid.UUID]]:
    """The ids of a few images of each collection, always the same, from all over it: the order is by SHA-256."""
    few = (
        select(Image.id, Image.sha256, Image.collection_id)
        .where(Image.collection_id == Collection.id)
        .order_by(Image.sha256)
        .limit(each)
        .lateral()
    )
    found: dict[uuid.UUID, list[uuid.UUID]] = {collection_id: [] for collection_id in collection_ids}
    rows = session.execute(
        select(few.c.collection_id, few.c.id)
        .select_from(Collection)
        .join(few, true())
        .where(Collection.id.in_(collection_ids))
        .order_by(few.c.sha256)
    )
    for collection_id, image_id in rows:
        found[collection_id].append(image_id)
    return found
