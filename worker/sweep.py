"""Finds what was lost: leases that ran out, rings that nobody heard, files that no row names.

It runs in a thread of every worker and not on Celery's schedule, because it must also run while the broker
is away. Every step is a conditional UPDATE, so that any number of sweepers agree.
"""

import threading
import time
import uuid
from collections.abc import Callable

import structlog

from app import queue, storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Collection, Run, Upload
from app.metrics import SWEEPER
from app.services import jobs, uploads
from worker.transactions import is_away, settle

log = structlog.get_logger(__name__)

# Received files that no row names: a request still under way, or one whose API died. A day is the promise.
_ORPHAN_AGE_S = 23 * 3600.0
_CLEAN_EVERY_S = 3600.0
# After the end of a lease, so that it has run out by the database's clock.
_LATE_S = 0.1


class Sweeper(threading.Thread):
    def __init__(self, stop: threading.Event) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._stopping = stop
        self._away_at: float | None = None
        self._cleaned_at: float | None = None

    def run(self) -> None:
        wait_s = settings().sweep_s
        while not self._stopping.wait(wait_s):
            wait_s = settings().sweep_s
            try:
                self._turn()
                wait_s = until_next_turn_s()
            except Exception as error:  # noqa: BLE001 - a sweeper that ends would leave lost work lost
                if is_away(error):
                    self._away_at = time.monotonic()
                log.warning("sweep_failed", error=type(error).__name__)

    def _turn(self) -> None:
        now = time.monotonic()
        # Leases also run out while the database is away; those who hold them may say so first once it is back.
        back = self._away_at is None or now - self._away_at > 2 * settings().heartbeat_s
        sweep(lost=back)
        remove_orphans()
        if self._cleaned_at is None or now - self._cleaned_at > _CLEAN_EVERY_S:
            self._cleaned_at = now
            remove_leftovers()


def until_next_turn_s() -> float:
    """Seconds until the next turn is due: `sweep_s`, or less where a lease runs out before, so that nobody waits on."""
    with open_session() as session:
        ends_s = [jobs.first_lease_end_s(session, table) for table in (Upload, Run)]
    return min([settings().sweep_s, *(end_s + _LATE_S for end_s in ends_s if end_s is not None)])


def sweep(*, lost: bool = True) -> None:
    """One turn: requeue what was lost, then ring for what waits and may not have been heard."""
    if lost:
        requeue_lost(Upload)
        requeue_lost(Run)
    with open_session() as session:
        failed = jobs.fail_runs_of_failed_uploads(session)
        session.commit()
        waiting_uploads = jobs.waiting(session, Upload, settings().sweep_s)
        waiting_runs = jobs.waiting(session, Run, settings().sweep_s)
    SWEEPER.labels(action="failed_without_upload").inc(len(failed))
    for identity in failed:
        log.warning("run_without_upload", id=str(identity))
    _ring(queue.INGEST, queue.ring_upload, waiting_uploads)
    _ring(queue.TRAIN, queue.ring_run, waiting_runs)


def requeue_lost(table: jobs.JobTable) -> None:
    """Requeue what was lost, and clear away what no attempt will go on from."""
    with open_session() as session:
        lost = jobs.requeue_lost(session, table)
        session.commit()
        ended = jobs.ended(session, table, lost)
    SWEEPER.labels(action="requeued").inc(len(lost) - len(ended))
    SWEEPER.labels(action="given_up").inc(len(ended))
    for identity in lost:
        log.warning("lease_ran_out", noun=table.__tablename__[:-1], id=str(identity))
    if table is Run:
        for identity in ended:
            storage.remove_run_leftovers(identity)


def lose(table: jobs.JobTable, identity: uuid.UUID, attempt: int, stop: threading.Event) -> None:
    """Count an attempt as lost at once, as when its lease runs out, and ring for the next."""
    settle(lambda session: jobs.expire(session, table, identity, attempt), stop)
    requeue_lost(table)
    ring = queue.ring_run if table is Run else queue.ring_upload
    ring(identity)


def _ring(task: str, ring: Callable[[uuid.UUID], bool], waiting: list[uuid.UUID]) -> None:
    """Ring for what waits, unless as many rings are already in the queue for busy workers to hear."""
    if not waiting or queue.depth(task) >= len(waiting):
        return
    for identity in waiting:
        if not ring(identity):
            return
        SWEEPER.labels(action="rung_again").inc()


def remove_orphans() -> None:
    """Delete received files that no open upload names, once they are old enough to be no request's."""
    now = storage.now()
    for folder in storage.all_incoming():
        try:
            upload_id = uuid.UUID(folder.name)
            # A slow request writes to one file for long, which its folder does not notice.
            young = any(now - path.stat().st_mtime < _ORPHAN_AGE_S for path in (folder, *folder.iterdir()))
        except (ValueError, FileNotFoundError):
            continue
        if young:
            continue
        with open_session() as session:
            if uploads.is_open(session, upload_id):
                continue
        SWEEPER.labels(action="orphan_removed").inc()
        log.warning("orphan_removed", upload=str(upload_id))
        storage.remove(folder)


def _end_deletions() -> None:
    """Carry out the deletions whose process ended between the end of the rows and that of the folders."""
    now = storage.now()
    for collection_id, runs, began in storage.all_deletions():
        with open_session() as session:
            there = session.get(Collection, collection_id) is not None
        if not there:
            SWEEPER.labels(action="deletion_ended").inc()
            log.warning("deletion_ended", collection=str(collection_id))
            storage.carry_out(collection_id, runs)
        elif now - began > _CLEAN_EVERY_S:  # it was not committed, or is long about to be
            storage.forget_deletion(collection_id)


def remove_leftovers() -> None:
    """Delete what killed attempts of finished runs left, which nobody will go on from, and what a deletion left."""
    _end_deletions()
    for folder in storage.all_discarded():
        storage.remove(folder)
    for folder in storage.all_runs():
        try:
            run_id = uuid.UUID(folder.name)
        except ValueError:
            continue
        if not any(path.exists() for path in storage.run_leftovers(run_id)):
            continue
        with open_session() as session:
            over = jobs.ended(session, Run, [run_id])
        if over:
            SWEEPER.labels(action="leftovers_removed").inc()
            log.warning("leftovers_removed", run=str(run_id))
            storage.remove_run_leftovers(run_id)
