"""Doorbells: an id in, one call, nothing else."""

import uuid

from structlog.contextvars import bound_contextvars

from app import queue
from worker.celery_app import STOP, app
from worker.ingest import ingest
from worker.supervise import supervise


@app.task(name=queue.INGEST)
def ingest_upload(upload_id: str) -> None:
    with bound_contextvars(upload=upload_id):
        ingest(uuid.UUID(upload_id), STOP)


@app.task(name=queue.TRAIN)
def train_run(run_id: str) -> None:
    with bound_contextvars(run=run_id):
        supervise(uuid.UUID(run_id), STOP)
