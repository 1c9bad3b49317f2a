"""What one tenant may have at once, so that there is something left for the others."""

import uuid

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.config import settings
from app.db.tables import Image, Run, Upload
from app.errors import TooLarge, TooMany

_RETRY_S = 30


def check_queue(session: Session, tenant_id: uuid.UUID) -> None:
    """Raise `TooMany` when a tenant has as many runs waiting as it may. Two that ask at once take turns."""
    _take_turn(session, tenant_id)
    limit = settings().max_queued_runs
    waiting = session.scalar(
        select(func.count()).select_from(Run).where(Run.tenant_id == tenant_id, Run.state == "queued")
    )
    if (waiting or 0) >= limit:
        raise TooMany(
            f"At most {limit} runs may wait at a time; cancel some, or start this one when some are done.",
            code="too-many-runs",
            retry_after_s=_RETRY_S,
        )


def check_room(session: Session, tenant_id: uuid.UUID, coming: int) -> None:
    """Raise `TooLarge` when `coming` more bytes are more than a tenant may keep.

    What is on its way counts as it arrived, or as what it has brought so far where that is more: an archive may bring
    more once it is unpacked. Then the next is refused.
    """
    limit = settings().max_stored_bytes
    if limit is None:
        return
    _take_turn(session, tenant_id)
    images = select(func.coalesce(func.sum(Image.bytes), 0)).where(Image.tenant_id == tenant_id)
    brought = select(func.coalesce(func.sum(Image.bytes), 0)).where(Image.upload_id == Upload.id).scalar_subquery()
    on_its_way = select(func.coalesce(func.sum(func.greatest(Upload.bytes - brought, 0)), 0)).where(
        Upload.tenant_id == tenant_id, Upload.state.in_(("queued", "running"))
    )
    kept = int(session.scalar(images) or 0) + int(session.scalar(on_its_way) or 0)
    if kept + coming > limit:
        raise TooLarge(
            f"You may keep {limit} bytes of images and have {kept}; this would bring {coming} more. "
            "Delete collections to make room.",
            code="quota-exceeded",
        )


def _take_turn(session: Session, tenant_id: uuid.UUID) -> None:
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:tenant, 0))"), {"tenant": str(tenant_id)})
