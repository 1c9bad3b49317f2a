"""Prometheus metrics: what this process counts, what the tables tell, and what workers wrote beside their data.

Workers are other processes, often on other machines, and share the data folder with the API: each writes what it
counts to `{data_dir}/metrics/{worker}.prom`, atomically. Labels are words of this code and names of workers, never ids
or anybody's names.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, write_to_textfile
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from app import queue, storage
from app.db.session import open_session
from app.services import statistics

log = structlog.get_logger(__name__)

# A worker writes every 15 s; what is much older was written by one that is gone.
_STALE_S = 120.0

API = CollectorRegistry(auto_describe=False)
WORKER = CollectorRegistry(auto_describe=False)

REQUESTS = Counter(
    "kindred_http_requests", "Requests answered, by route and status.", ["method", "route", "status"], registry=API
)
REQUEST_SECONDS = Histogram(
    "kindred_http_request_seconds",
    "Time to the end of the answer.",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600),
    registry=API,
)
SWEEPER = Counter(
    "kindred_sweeper_actions", "What sweepers did about lost work, by action.", ["action"], registry=WORKER
)
for _action in (
    "requeued",
    "given_up",
    "failed_without_upload",
    "rung_again",
    "orphan_removed",
    "leftovers_removed",
    "deletion_ended",
):
    SWEEPER.labels(action=_action)


class _Tables(Collector):
    """Asked at each scrape, so that it is true whatever process did the work, and after a restart."""

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("kindred_database_up", "Whether the database answered this scrape.")
        try:
            with open_session() as session:
                found = statistics.read(session)
        except SQLAlchemyError as error:
            log.warning("metrics_without_database", error=type(error).__name__)
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        jobs = GaugeMetricFamily("kindred_jobs", "Runs and uploads by state.", labels=["kind", "state"])
        for (kind, state), count in found.jobs.items():
            jobs.add_metric([kind, state], count)
        yield jobs
        for name, words, values in (
            ("kindred_oldest_queued_seconds", "Age of the job that waits longest.", found.oldest_queued_s),
            ("kindred_heartbeat_age_seconds", "Age of the oldest heartbeat of a running job.", found.heartbeat_age_s),
            ("kindred_lost_attempts", "Attempts that were lost, of all jobs that are there.", found.lost_attempts),
        ):
            family = GaugeMetricFamily(name, words, labels=["kind"])
            for kind, value in values.items():
                family.add_metric([kind], value)
            yield family
        yield GaugeMetricFamily(
            "kindred_ingest_images_per_second",
            "Of the uploads that succeeded within the last hour.",
            value=found.ingest_images_per_s,
        )
        yield GaugeMetricFamily(
            "kindred_training_images_per_second",
            "Images of the runs that succeeded within the last hour, over their seconds.",
            value=found.training_images_per_s,
        )


class _Surroundings(Collector):
    """The broker, the disk and the workers."""

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("kindred_queue_depth", "Messages that no worker has taken.", labels=["queue"])
        for task, name in queue.QUEUES.items():
            depth.add_metric([name], queue.depth(task))
        yield depth
        yield GaugeMetricFamily("kindred_disk_free_bytes", "Of the data folder.", value=storage.free_bytes())
        yield from _of_workers()


def _of_workers() -> Iterator[Metric]:
    seen = GaugeMetricFamily("kindred_worker_seen_seconds", "Since a worker last wrote its metrics.", labels=["worker"])
    counters: dict[str, CounterMetricFamily] = {}
    for path in sorted(storage.metrics().glob("*.prom")):
        try:
            age, content = time.time() - path.stat().st_mtime, path.read_text()
        except OSError:
            continue
        seen.add_metric([path.stem], max(0.0, age))
        if age > _STALE_S:
            continue
        for family in text_string_to_metric_families(content):
            for sample in family.samples:
                if not sample.name.endswith("_total"):
                    continue
                names = sorted(sample.labels)
                known = counters.setdefault(
                    family.name,
                    CounterMetricFamily(family.name, family.documentation, labels=[*names, "worker"]),
                )
                known.add_metric([*(sample.labels[name] for name in names), path.stem], sample.value)
    yield seen
    yield from counters.values()


API.register(_Tables())
API.register(_Surroundings())


def scrape() -> bytes:
    """The whole page, in Prometheus' text format."""
    return generate_latest(API)


def write_worker(name: str) -> None:
    """Make what this worker has counted readable for the API. Raises `OSError`."""
    path = _worker_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), WORKER)


def remove_worker(name: str) -> None:
    """A worker that ends says so; one that is killed leaves its file, whose age tells."""
    _worker_file(name).unlink(missing_ok=True)


def _worker_file(name: str) -> Path:
    return (
        storage.metrics()
        / f"{''.join(letter if letter.isalnum() or letter in '@.-_' else '_' for letter in name)}.prom"
    )
