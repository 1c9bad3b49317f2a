"""Rings the worker's doorbell, by task name. A lost ring delays work, it never loses it: workers sweep."""

import uuid
from functools import lru_cache

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.config import settings

log = structlog.get_logger(__name__)

INGEST = "kindred.ingest"
TRAIN = "kindred.train"
QUEUES = {INGEST: "ingest", TRAIN: "train"}


@lru_cache(maxsize=1)
def _celery() -> Celery:
    celery = Celery("kindred", broker=settings().broker_url, set_as_current=False)
    celery.conf.update(
        task_ignore_result=True,
        broker_transport_options={"socket_timeout": 3, "socket_connect_timeout": 3, "max_retries": 1},
    )
    return celery


def ring(task: str, identity: uuid.UUID) -> bool:
    """Tell a worker that a row waits. False when the broker is away: the sweeper rings again."""
    try:
        _celery().send_task(task, args=[str(identity)], queue=QUEUES[task], retry=False)
    except (OperationalError, OSError, RedisError) as error:
        log.warning("broker_away", task=task, id=str(identity), error=type(error).__name__)
        return False
    return True


def ring_upload(upload_id: uuid.UUID) -> bool:
    return ring(INGEST, upload_id)


def ring_run(run_id: uuid.UUID) -> bool:
    return ring(TRAIN, run_id)


def answers() -> bool:
    """Whether the broker is there."""
    try:
        with _celery().connection_for_read() as connection:
            return bool(connection.default_channel.client.ping())
    except (OperationalError, OSError, RedisError):
        return False


def depth(task: str) -> int:
    """How many rings nobody has heard yet; 0 when the broker is away, or was emptied."""
    try:
        with _celery().connection_for_read() as connection:
            return int(connection.default_channel.client.llen(QUEUES[task]))
    except (OperationalError, OSError, RedisError):
        return 0
