"""Finds what was lost: leases that ran out, rings that nobody heard, files that no row names.

It runs in a thread of every worker and not on Celery's schedule, because it must also run while the broker
is away. Every step is a conditional UPDATE, so that any number of sweepers agree.
"""

import threading
import time
import uuid
from collections.abc import Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import queue, storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Run, Upload
from app.services import jobs, uploads

log = structlog.get_logger(__name__)

_ORPHAN_AGE_S = 24 * 3600.0


class Sweeper(threading.Thread):
    def __init__(self, stop: threading.Event) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._stopping = stop

    def run(self) -> None:
        while not self._stopping.wait(settings().sweep_s):
            try:
                sweep()
                remove_orphans()
            except (SQLAlchemyError, OSError) as error:
                # The database is away; the next turn looks again.
                log.warning("sweep_failed", error=type(error).__name__)


def sweep() -> None:
    """One turn: requeue what was lost, then ring for what waits and may not have been heard."""
    with open_session() as session:
        lost_uploads = jobs.requeue_lost(session, Upload)
        lost_runs = jobs.requeue_lost(session, Run)
        failed = jobs.fail_runs_of_failed_uploads(session)
        session.commit()
        waiting_uploads = jobs.waiting(session, Upload, settings().sweep_s)
        waiting_runs = jobs.waiting(session, Run, settings().sweep_s)
    for noun, lost in (("upload", lost_uploads), ("run", lost_runs)):
        for identity in lost:
            log.warning("lease_ran_out", noun=noun, id=str(identity))
    for identity in failed:
        log.warning("run_without_upload", id=str(identity))
    _ring(queue.INGEST, queue.ring_upload, waiting_uploads)
    _ring(queue.TRAIN, queue.ring_run, waiting_runs)


def _ring(task: str, ring: Callable[[uuid.UUID], bool], waiting: list[uuid.UUID]) -> None:
    """Ring for what waits, unless as many rings are already in the queue for busy workers to hear."""
    if not waiting or queue.depth(task) >= len(waiting):
        return
    for identity in waiting:
        if not ring(identity):
            return


def remove_orphans() -> None:
    """Delete received files that no open upload names, once they are a day old."""
    for folder in storage.all_incoming():
        try:
            upload_id = uuid.UUID(folder.name)
            age_s = time.time() - folder.stat().st_mtime
        except (ValueError, FileNotFoundError):
            continue
        if age_s < _ORPHAN_AGE_S:
            continue
        with open_session() as session:
            if uploads.is_open(session, upload_id):
                continue
        log.warning("orphan_removed", upload=str(upload_id))
        storage.remove(folder)
