"""Claim, lease, fence: the one state machine of uploads and runs.

    queued → running → succeeded | failed | cancelled

Every change of state is one conditional UPDATE that says from which state it starts; no row is an answer.
Time is the database's. Each function opens no session and commits nothing.
"""

import uuid
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, CursorResult, Text, and_, case, cast, exists, func, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from app.config import settings
from app.db.tables import Collection, Job, Run, Upload

JobTable = type[Upload] | type[Run]
J = TypeVar("J", Upload, Run)

# Of a run or an upload that was given up as `worker_lost`; how often it was lost fills the gap.
LOST_DETAIL = "The worker was lost {} times while it worked on this; it was given up."


def _lease() -> ColumnElement[Any]:
    return func.now() + timedelta(seconds=settings().lease_s)


def _may_start(table: JobTable) -> ColumnElement[bool]:
    """A run waits for its upload; an upload waits for the one before it in its collection."""
    if table is Run:
        return ~exists().where(Upload.id == Run.upload_id, Upload.state.in_(("queued", "running")))
    earlier = aliased(Upload)
    return ~exists().where(
        earlier.collection_id == Upload.collection_id,
        earlier.id != Upload.id,
        or_(
            earlier.state == "running",
            and_(
                earlier.state == "queued",
                or_(
                    earlier.created_at < Upload.created_at,
                    and_(earlier.created_at == Upload.created_at, earlier.id < Upload.id),
                ),
            ),
        ),
    )


def claim(session: Session, table: type[J], identity: uuid.UUID) -> J | None:
    """Start a queued job. None: somebody else has it, it is over, or it must wait. Drop the message."""
    if table is Run:
        # Until uploads that are being finished are so for everybody: all attempts are to see the same images.
        _lock_collection(session, table, identity, read=True)
    statement = (
        update(table)
        .where(table.id == identity, table.state == "queued", _may_start(table))
        .values(
            state="running",
            attempt=table.attempt + 1,
            lease_until=_lease(),
            started_at=func.coalesce(table.started_at, func.clock_timestamp()),
        )
        .returning(table)
        .execution_options(synchronize_session=False)
    )
    try:
        with session.begin_nested():
            return session.execute(statement).scalar_one_or_none()
    except IntegrityError:
        # Two uploads of a collection, claimed at the same moment: neither saw the other, the index did.
        return None


def heartbeat(session: Session, table: JobTable, identity: uuid.UUID, attempt: int, **values: Any) -> bool:
    """Renew the lease and record progress. False: the job is no longer this attempt's; stop at once."""
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.attempt == attempt, table.state == "running")
        .values(lease_until=_lease(), **values),
    )


def finish(session: Session, table: JobTable, identity: uuid.UUID, attempt: int, **values: Any) -> bool:
    """The one way to succeed. False: somebody else ended the job; roll back whatever belongs to it."""
    extra: list[ColumnElement[bool]] = [Run.cancel_requested_at.is_(None)] if table is Run else []
    if table is Upload:
        _lock_collection(session, table, identity, key_share=True)
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.attempt == attempt, table.state == "running", *extra)
        .values(state="succeeded", progress=1.0, lease_until=None, finished_at=func.clock_timestamp(), **values),
    )


def _lock_collection(
    session: Session, table: JobTable, identity: uuid.UUID, *, read: bool = False, key_share: bool = False
) -> None:
    """Let the start of a run and the end of an upload take turns until the commit, at `clock_timestamp()`.

    `now()` is when a transaction began: by it, an upload could end before a run starts that does not see it yet.
    """
    of_job = select(table.collection_id).where(table.id == identity).scalar_subquery()
    session.execute(
        select(Collection.id).where(Collection.id == of_job).with_for_update(read=read, key_share=key_share)
    )


def fail(
    session: Session,
    table: JobTable,
    identity: uuid.UUID,
    attempt: int,
    problem: dict[str, Any],
    **values: Any,
) -> bool:
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.attempt == attempt, table.state == "running")
        .values(state="failed", problem=problem, lease_until=None, finished_at=func.now(), **values),
    )


def refuse(session: Session, table: JobTable, identity: uuid.UUID, problem: dict[str, Any]) -> bool:
    """Fail a job that has not begun, and never could."""
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.state == "queued")
        .values(state="failed", problem=problem, finished_at=func.now()),
    )


def release(session: Session, table: JobTable, identity: uuid.UUID, attempt: int) -> bool:
    """Give a running job back unharmed, as a worker does that is told to stop. Not a lost attempt.

    A run that was asked to stop meanwhile has stopped with that.
    """
    values: dict[str, Any] = {"state": "queued"}
    if table is Run:
        asked = Run.cancel_requested_at.is_not(None)
        values = {
            "state": case((asked, "cancelled"), else_="queued"),
            "finished_at": case((asked, func.now())),
            "eta_s": None,
        }
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.attempt == attempt, table.state == "running")
        .values(lease_until=None, **values),
    )


def has_succeeded(session: Session, table: JobTable, identity: uuid.UUID, attempt: int) -> bool:
    """Whether this attempt has finished the job already, by a commit whose answer was lost."""
    found = session.scalar(
        select(table.id).where(table.id == identity, table.attempt == attempt, table.state == "succeeded")
    )
    return found is not None


def end_cancelled(session: Session, identity: uuid.UUID, attempt: int) -> bool:
    """The worker's answer to a cancel request, once the trainer is gone."""
    return _changed(
        session,
        update(Run)
        .where(Run.id == identity, Run.attempt == attempt, Run.state == "running")
        .values(state="cancelled", lease_until=None, finished_at=func.now(), eta_s=None),
    )


def is_last(job: Job) -> bool:
    """Whether a job is given up once this attempt is lost too."""
    return job.lost_attempts + 1 >= settings().max_attempts


def requeue_lost(session: Session, table: JobTable) -> list[uuid.UUID]:
    """Requeue jobs whose lease ran out; after `max_attempts` losses a run has failed.

    An upload is requeued even then: whoever claims it takes back what it brought, and fails it.
    """
    lost = table.lost_attempts + 1
    if table is Upload:
        return _requeue(session, table, lost_attempts=lost, state="queued")
    over = lost >= settings().max_attempts
    problem = func.jsonb_build_object(
        "code",
        "worker_lost",
        "detail",
        func.replace(LOST_DETAIL, "{}", cast(lost, Text)),
    )
    cancelled = Run.cancel_requested_at.is_not(None)
    state = case((cancelled, literal("cancelled")), (over, literal("failed")), else_=literal("queued"))
    return _requeue(
        session,
        table,
        lost_attempts=lost,
        state=state,
        finished_at=case((or_(over, cancelled), func.now())),
        problem=case((state == "failed", problem)),
        eta_s=None,
    )


def _requeue(session: Session, table: JobTable, **values: Any) -> list[uuid.UUID]:
    # A worker that was frozen while it held its row locks it still: the others are not to wait for it.
    lost = (
        select(table.id)
        .where(table.state == "running", table.lease_until < func.now())
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    rows = session.execute(
        update(table)
        .where(table.id.in_(lost))
        .values(lease_until=None, **values)
        .returning(table.id)
        .execution_options(synchronize_session=False)
    )
    return list(rows.scalars())


def first_lease_end_s(session: Session, table: JobTable) -> float | None:
    """Seconds until the next lease runs out, unless it is renewed; None where none is held."""
    left = session.scalar(
        select(func.extract("epoch", func.min(table.lease_until) - func.now())).where(
            table.state == "running", table.lease_until >= func.now()
        )
    )
    return None if left is None else float(left)


def ended(session: Session, table: JobTable, identities: list[uuid.UUID]) -> list[uuid.UUID]:
    """Those of these jobs that have ended, or are no longer there."""
    open_ = session.scalars(
        select(table.id).where(table.id.in_(identities), table.state.in_(("queued", "running")))
    ).all()
    return [identity for identity in identities if identity not in open_]


def expire(session: Session, table: JobTable, identity: uuid.UUID, attempt: int) -> bool:
    """Count a running attempt as lost, as when its process was killed; `requeue_lost` goes on from there."""
    return _changed(
        session,
        update(table)
        .where(table.id == identity, table.attempt == attempt, table.state == "running")
        .values(lease_until=func.now() - timedelta(seconds=1)),
    )


def fail_runs_of_failed_uploads(session: Session) -> list[uuid.UUID]:
    """A one-shot run whose upload ended without images can never start."""
    rows = session.execute(
        update(Run)
        .where(Run.upload_id == Upload.id, Run.state == "queued", Upload.state.in_(("failed", "cancelled")))
        .values(
            state="failed",
            finished_at=func.now(),
            problem=func.jsonb_build_object(
                "code",
                "upload-failed",
                "detail",
                func.concat("The upload failed: ", Upload.problem["detail"].astext),
            ),
        )
        .returning(Run.id)
        .execution_options(synchronize_session=False)
    )
    return list(rows.scalars())


def waiting(session: Session, table: JobTable, older_than_s: float, limit: int = 100) -> list[uuid.UUID]:
    """Queued jobs that could start and whose ring may have been lost, oldest first."""
    rows = session.execute(
        select(table.id)
        .where(
            table.state == "queued",
            table.created_at < func.now() - timedelta(seconds=older_than_s),
            _may_start(table),
        )
        .order_by(table.created_at)
        .limit(limit)
    )
    return list(rows.scalars())


def _changed(session: Session, statement: Any) -> bool:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)  # noqa: S101 - tells the type checker what DML returns
    return result.rowcount == 1
