"""Celery's settings, each with its reason. A message is a doorbell: PostgreSQL holds the truth.

celery -A worker.celery_app worker -Q ingest -P threads -c 1
celery -A worker.celery_app worker -Q train  -P threads -c 1
"""

import threading
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_init, worker_shutting_down

from app.config import settings
from app.logs import configure_logs
from app.queue import QUEUES
from worker.report import Reporter
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
    # A waiting message belongs to whoever is free, not to the worker that is busy. With early acknowledgement a
    # multiplier of 1 still takes one message ahead, for as long as a training lasts; this takes none. Redis only.
    worker_disable_prefetch=True,
    worker_prefetch_multiplier=1,
    # Redis may be away for a while; running work must not notice. Nor is there a late acknowledgement to lose, for
    # which Celery would then take fewer messages.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_enable_prefetch_count_reduction=False,
    # It may also be away when the worker starts, and for longer than a hundred tries (the default) last.
    broker_connection_retry=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # An answer that is no answer (a replica after a failover, a server that still loads) is no reason to leave.
    broker_channel_error_retry=True,
    broker_transport_options={
        # Of a Redis that takes connections and does not speak.
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
    },
    task_routes={name: {"queue": queue} for name, queue in QUEUES.items()},
    task_create_missing_queues=True,
    # No gossip, no events: workers need to know nothing of each other. Nor does anybody who reaches Redis get to shut
    # workers down: a run is cancelled in PostgreSQL, a worker is stopped by a signal.
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
)


@setup_logging.connect
def _logs(loglevel: int | str = "INFO", **_: Any) -> None:
    configure_logs(loglevel)


# Not when the worker is ready, which it is not before Redis answers.
@worker_init.connect
def _start_sweeping(sender: Any, **_: Any) -> None:
    Sweeper(STOP).start()
    Reporter(sender.hostname, STOP).start()


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    STOP.set()
