"""What the tables tell of the service as a whole: jobs by state, how old they are, how fast they were."""

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Interval, cast, func, literal, select, text
from sqlalchemy.orm import Session

from app.config import settings
from app.db.tables import STATES, Cluster, Run, Upload
from app.services.jobs import JobTable

WINDOW_S = 3600


@dataclass(kw_only=True)
class Statistics:
    """Of each kind of job, `run` and `upload`; ages in seconds."""

    jobs: dict[tuple[str, str], int] = field(default_factory=dict)
    oldest_queued_s: dict[str, float] = field(default_factory=dict)
    heartbeat_age_s: dict[str, float] = field(default_factory=dict)
    lost_attempts: dict[str, int] = field(default_factory=dict)
    ingest_images_per_s: float = 0.0
    training_images_per_s: float = 0.0


def read(session: Session) -> Statistics:
    """A few sums over the jobs' tables. Not for long: who watches must not be who slows down."""
    session.execute(text("SET LOCAL statement_timeout = '5s'"))
    found = Statistics()
    for kind, table in (("run", Run), ("upload", Upload)):
        counts: dict[str, int] = dict(session.execute(select(table.state, func.count()).group_by(table.state)).all())
        found.jobs |= {(kind, state): counts.get(state, 0) for state in STATES}
        found.lost_attempts[kind] = session.scalar(select(func.coalesce(func.sum(table.lost_attempts), 0))) or 0
        found.oldest_queued_s[kind] = _age(session, table, "queued", table.created_at)
        # A lease begins with a heartbeat, and with every further one anew.
        beat = table.lease_until - cast(literal(f"{settings().lease_s} seconds"), Interval)
        found.heartbeat_age_s[kind] = _age(session, table, "running", beat)
    found.ingest_images_per_s = _speed(session, Upload, func.sum(Upload.received))
    sizes = select(func.sum(Cluster.size)).where(Cluster.run_id == Run.id).correlate(Run).scalar_subquery()
    found.training_images_per_s = _speed(session, Run, func.sum(sizes))
    return found


def _age(session: Session, table: JobTable, state: str, since: Any) -> float:
    age = session.scalar(select(func.extract("epoch", func.now() - func.min(since))).where(table.state == state))
    return max(0.0, float(age or 0.0))


def _speed(session: Session, table: JobTable, images: Any) -> float:
    """Images of the jobs that succeeded within the last hour, over the time that these took."""
    took = func.sum(func.extract("epoch", table.finished_at - table.started_at))
    window = cast(literal(f"{WINDOW_S} seconds"), Interval)
    row = session.execute(
        select(images, took).where(table.state == "succeeded", table.finished_at > func.now() - window)
    ).one()
    return float(row[0]) / float(row[1]) if row[0] and row[1] else 0.0
