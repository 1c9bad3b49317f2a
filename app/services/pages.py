"""Opaque cursors: where the next page starts, in a form that clients hand back untouched."""

import base64
import binascii
import json
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from app.db.tables import Collection, Run, Upload
from app.errors import Invalid

T = TypeVar("T")
D = TypeVar("D", Collection, Run, Upload)


class Page(NamedTuple, Generic[T]):
    items: list[T]
    next: str | None


def encode(position: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(list(position)).encode()).decode().rstrip("=")


def decode(cursor: str | None, *kinds: Callable[[Any], Any]) -> list[Any] | None:
    """The position in `cursor`, each element turned by its kind; `Invalid` for one that is not ours."""
    if cursor is None:
        return None
    try:
        position = json.loads(base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)))
        if not isinstance(position, list) or len(position) != len(kinds):
            raise ValueError(cursor)  # noqa: TRY301 - one answer for every cursor that is not ours
        return [kind(element) for kind, element in zip(kinds, position, strict=True)]
    except (ValueError, TypeError, AttributeError, OverflowError, binascii.Error, RecursionError) as error:
        raise Invalid(
            "This cursor is not one that this list gave out.",
            code="invalid-cursor",
            fields={"cursor": "unknown"},
        ) from error


def page(rows: Sequence[T], limit: int, position: Callable[[T], Sequence[Any]]) -> Page[T]:
    """A page out of `limit + 1` rows: the extra row only tells that there are more."""
    items = list(rows[:limit])
    return Page(items, encode(position(items[-1])) if len(rows) > limit else None)


def newest_first(
    session: Session, table: type[D], limit: int, cursor: str | None, *where: ColumnElement[bool]
) -> Page[D]:
    """A page of the rows of which all of `where` holds, by when they were made."""
    query = select(table).where(*where).order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)
    after = decode(cursor, datetime.fromisoformat, uuid.UUID)
    if after is not None:
        query = query.where(tuple_(table.created_at, table.id) < tuple_(*after))
    return page(session.scalars(query).all(), limit, lambda row: (row.created_at.isoformat(), str(row.id)))


def int32(value: Any) -> int:
    """A whole number that a column can hold; `true` is one for Python, and none for a comparison in SQL."""
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(value)
    return value


def int64(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(value)
    return value
