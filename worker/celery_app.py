"""Celery's settings, each with its reason. A message is a doorbell: PostgreSQL holds the truth.

celery -A worker.celery_app worker -Q ingest -P threads -c 1
celery -A worker.celery_app worker -Q train  -P threads -c 1
"""

import threading
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from app.config import settings
from app.logs import configure_logs
from app.queue import QUEUES
from worker.sweep import Sweeper

# Set when the worker is told to stop. The thread pool shares it with the tasks, a process pool would not.
STOP = threading.Event()

app = Celery("kindred", broker=settings().broker_url, include=["worker.tasks"])
app.conf.update(
    # An id is all that a message carries; nothing that could be unpickled into code.
    task_serializer="json",
    accept_content=["json"],
    # Answers live in PostgreSQL.
    task_ignore_result=True,
    result_backend=None,
    # Early acknowledgement: with late ones, Redis delivers a long task again after its visibility timeout,
    # while the first still runs. What is lost with a worker, the sweeper rings for again.
    task_acks_late=False,
    # A waiting message belongs to whoever is free, not to the worker that is busy.
    worker_prefetch_multiplier=1,
    # Redis may be away for a while; running work must not notice.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    task_routes={name: {"queue": queue} for name, queue in QUEUES.items()},
    task_create_missing_queues=True,
    # No gossip, no events: workers need to know nothing of each other.
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
)


@setup_logging.connect
def _logs(loglevel: int | str = "INFO", **_: Any) -> None:
    configure_logs(loglevel)


@worker_ready.connect
def _start_sweeping(**_: Any) -> None:
    Sweeper(STOP).start()


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    STOP.set()
