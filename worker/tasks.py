"""Doorbells: an id in, one call, nothing else."""

import uuid

from app import queue
from worker.celery_app import STOP, app
from worker.ingest import ingest
from worker.supervise import supervise


@app.task(name=queue.INGEST)
def ingest_upload(upload_id: str) -> None:
    ingest(uuid.UUID(upload_id), STOP)


@app.task(name=queue.TRAIN)
def train_run(run_id: str) -> None:
    supervise(uuid.UUID(run_id), STOP)
