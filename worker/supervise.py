"""Claim a run, start the trainer process, record its progress, store its results.

The trainer knows no database; this side knows no torch. They speak by a folder and by JSON lines.
"""

import json
import os
import queue as queues
import re
import signal
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import queue, storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Run
from app.errors import Invalid
from app.services import jobs, results, runs
from app.services.parameters import check_weights
from worker import outcomes
from worker.command import INTERNAL_ERROR, STORAGE_FULL, trainer_command
from worker.sweep import lose
from worker.transactions import is_away, settle

log = structlog.get_logger(__name__)

_TICK_S = 0.5
_PROGRESS_EVERY_S = 1.0
_RETRY_S = 1.0
# How long a trainer that is asked to leave may take: it ends its step and writes a checkpoint.
_TERMINATE_S = 15.0
_LOG_TAIL = 8000
# What a trainer's folder holds besides the artefacts of the run.
_INTERMEDIATE = ("specification.json", outcomes.JSON, outcomes.ARRAYS, "alive")
# torchrun ends with status 1 whatever became of its processes, and reports each.
_KILLED_IN_TORCHRUN = re.compile(r"^ *exitcode +: -\d+ ", re.MULTILINE)


@dataclass(kw_only=True)
class _Attempt:
    """One execution of a run, as this worker sees it."""

    run_id: uuid.UUID
    number: int
    last: bool  # once it is lost, the run is given up
    stop: threading.Event  # set when the worker is told to stop
    images: list[outcomes.Image]
    parameters: dict[str, Any]
    news: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    log_from: int = 0  # where this attempt's part of the trainer's log begins
    stopped: bool = False  # by a signal that was not ours, with a checkpoint written

    @property
    def folder(self) -> Path:
        return storage.attempt(self.run_id, self.number)

    @property
    def alive(self) -> Path:
        """Touched for as long as somebody watches the trainer; a trainer that nobody watches ends itself."""
        return self.folder / "alive"

    @property
    def log(self) -> Path:
        return storage.run(self.run_id) / "trainer.log"


class _Lost(Exception):
    """The run is no longer this attempt's."""


class _Cancelled(Exception):
    pass


class _Stopping(Exception):
    """The worker is told to stop."""


def supervise(run_id: uuid.UUID, stop: threading.Event) -> None:
    """Execute one attempt of a run, unless somebody else has it or it is over."""
    with open_session() as session:
        run = jobs.claim(session, Run, run_id)
        if run is None:
            log.info("nothing_to_claim", run=str(run_id))
            return
        images = runs.trainer_images(session, run)
        collection_id = run.collection_id
        attempt = _Attempt(
            run_id=run_id,
            number=run.attempt,
            last=jobs.is_last(run),
            stop=stop,
            images=images,
            parameters=dict(run.parameters),
        )
        session.commit()
    log.info("run_claimed", run=str(run_id), attempt=attempt.number, images=len(images))
    try:
        _execute(attempt, collection_id)
    except Invalid as error:
        _end(attempt, {"code": error.code, "detail": error.detail})
    except _Lost:
        log.warning("run_lost", run=str(run_id), attempt=attempt.number)
    except _Cancelled:
        _end_cancelled(attempt)
    except _Stopping:
        _release(attempt)
    except Exception as error:
        if is_away(error):
            raise  # the sweeper goes on from here
        if storage.is_full(error):
            _end(attempt, STORAGE_FULL)
            return
        log.exception("attempt_broke", run=str(run_id), attempt=attempt.number)
        if attempt.last:
            _end(attempt, INTERNAL_ERROR)
        else:
            # It may have been the machine's mood; a training with the backbone has a checkpoint.
            lose(Run, run_id, attempt.number, stop)
    finally:
        storage.remove(attempt.folder)


def _execute(attempt: _Attempt, collection_id: uuid.UUID) -> None:
    runs.check_enough(attempt.parameters["clusters"], len(attempt.images))
    check_weights(attempt.parameters.get("weights"))  # the file may be gone by now
    _write_specification(attempt, collection_id)
    _conclude(attempt, _watch(attempt))


def _write_specification(attempt: _Attempt, collection_id: uuid.UUID) -> None:
    named = attempt.parameters.get("weights")
    specification = {
        "parameters": attempt.parameters,
        "weights": named if named in (None, "random") else str(storage.weights(named)),
        "features": str(storage.features(collection_id)),
        "checkpoint": str(storage.checkpoint(attempt.run_id)),
        "checkpoint_s": settings().checkpoint_s,
        # Gone before the lease is: nobody can have claimed the run yet.
        "lease_s": max(settings().lease_s - settings().heartbeat_s, settings().lease_s / 2),
        "images": [
            {"key": sha256, "path": str(storage.original(collection_id, sha256)), "filename": filename}
            for _, sha256, filename in attempt.images
        ],
    }
    attempt.folder.mkdir(parents=True, exist_ok=True)
    attempt.alive.touch()
    with storage.atomic_write(attempt.folder / "specification.json") as file:
        file.write(json.dumps(specification).encode())


def _watch(attempt: _Attempt) -> int:
    """Run the trainer to its end; its exit status. Whatever else ends the attempt is an exception."""
    with attempt.log.open("ab") as errors:
        attempt.log_from = errors.tell()
        trainer = subprocess.Popen(
            trainer_command(attempt.folder, attempt.parameters),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    try:
        lines = _lines(trainer)
        next_report = 0.0
        while not _take_news(attempt, lines):
            attempt.alive.touch()
            if attempt.stop.is_set():
                raise _Stopping
            now = time.monotonic()
            due = next_report - (settings().heartbeat_s - _PROGRESS_EVERY_S if attempt.news else 0.0)
            if now >= due:
                # A lease may run out soon where the database was away: then it is tried more often.
                next_report = now + (settings().heartbeat_s if _report(attempt) else _RETRY_S)
            elif _cancel_requested(attempt):
                raise _Cancelled
        _report(attempt)
        return trainer.wait()
    finally:
        _stop_group(trainer)


def _lines(trainer: subprocess.Popen[bytes]) -> "queues.SimpleQueue[bytes | None]":
    lines: queues.SimpleQueue[bytes | None] = queues.SimpleQueue()

    def read() -> None:
        assert trainer.stdout is not None  # noqa: S101 - it is a pipe
        with trainer.stdout as output:
            for line in output:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="trainer-output", daemon=True).start()
    return lines


def _take_news(attempt: _Attempt, lines: "queues.SimpleQueue[bytes | None]") -> bool:
    """Read what the trainer said within a tick; True once it has nothing more to say."""
    deadline = time.monotonic() + _TICK_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queues.Empty:
            return False
        if line is None:
            return True
        try:
            event = json.loads(line)
            kind = event.pop("event")
        except (ValueError, AttributeError, KeyError, TypeError):
            log.warning("trainer_chatters", run=str(attempt.run_id), line=line[:200])  # a library that prints
            continue
        if kind == "error":
            attempt.error = {"code": event["code"], "detail": event["detail"]}
        elif kind == "stopped":
            attempt.stopped = True
        else:
            attempt.news.update(event)
    return False


def _report(attempt: _Attempt) -> bool:
    """Renew the lease and tell the database the news. False: it is away, and is to be tried again later."""
    try:
        with open_session() as session:
            alive = jobs.heartbeat(session, Run, attempt.run_id, attempt.number, **attempt.news)
            session.commit()
            cancel = alive and runs.cancel_requested(session, attempt.run_id)
    except SQLAlchemyError as error:
        log.warning("heartbeat_failed", run=str(attempt.run_id), error=type(error).__name__)
        return False
    attempt.news.clear()
    if not alive:
        raise _Lost
    if cancel:
        raise _Cancelled
    return True


def _cancel_requested(attempt: _Attempt) -> bool:
    try:
        with open_session() as session:
            return runs.cancel_requested(session, attempt.run_id)
    except SQLAlchemyError:
        return False


def _stop_group(trainer: subprocess.Popen[bytes]) -> None:
    """End the trainer and whatever it started: first a word, then force."""
    for sign, patience_s in ((signal.SIGTERM, _TERMINATE_S), (signal.SIGKILL, None)):
        if trainer.poll() is not None:
            break
        os.killpg(trainer.pid, sign)
        try:
            trainer.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)  # children that outlived it


def _said(attempt: _Attempt) -> str:
    """The end of what the trainer logged in this attempt."""
    with attempt.log.open("rb") as log_file:
        end = log_file.seek(0, os.SEEK_END)
        log_file.seek(max(attempt.log_from, end - _LOG_TAIL))
        return log_file.read().decode(errors="replace")


def _conclude(attempt: _Attempt, status: int) -> None:
    said = _said(attempt)
    if status == 0:
        _store(attempt)
    elif attempt.error is not None:
        _end(attempt, attempt.error)
    elif attempt.stopped or (status == -signal.SIGTERM and attempt.stop.is_set()):
        # The second is a head, when the service manager tells every process of the service to stop.
        _release(attempt)
    elif status < 0 or _KILLED_IN_TORCHRUN.search(said):
        log.warning("trainer_killed", run=str(attempt.run_id), attempt=attempt.number, status=status)
        lose(Run, attempt.run_id, attempt.number, attempt.stop)
    else:
        log.error("trainer_failed", run=str(attempt.run_id), attempt=attempt.number, status=status, said=said)
        # With it, the trainer can be run by hand to see what went wrong.
        specification = attempt.folder / "specification.json"
        specification.replace(storage.run(attempt.run_id) / specification.name)
        _end(
            attempt,
            {
                "code": "training-failed",
                "detail": "The training stopped because of an error of its own, not of your images; "
                "the service's log holds the details.",
            },
        )


def _release(attempt: _Attempt) -> None:
    """Give the run back; whoever claims it next goes on from its checkpoint."""

    def release(session: Session) -> bool:
        jobs.release(session, Run, attempt.run_id, attempt.number)
        return bool(jobs.ended(session, Run, [attempt.run_id]))

    if settle(release, attempt.stop):  # it was cancelled meanwhile
        storage.remove_run_leftovers(attempt.run_id)
    else:
        queue.ring_run(attempt.run_id)
    log.info("run_released", run=str(attempt.run_id), attempt=attempt.number)


def _end_cancelled(attempt: _Attempt) -> None:
    if settle(lambda session: jobs.end_cancelled(session, attempt.run_id, attempt.number), attempt.stop):
        storage.remove_run_leftovers(attempt.run_id)
        log.info("run_cancelled", run=str(attempt.run_id), attempt=attempt.number)


def _end(attempt: _Attempt, problem: dict[str, str]) -> None:
    def fail(session: Session) -> bool:
        return jobs.fail(session, Run, attempt.run_id, attempt.number, problem, eta_s=None)

    if settle(fail, attempt.stop):
        storage.remove_run_leftovers(attempt.run_id)
    log.warning("run_failed", run=str(attempt.run_id), attempt=attempt.number, code=problem["code"])


def _store(attempt: _Attempt) -> None:
    """Results and the end of the run in one transaction, fenced by the attempt."""
    outcome = outcomes.read(attempt.folder, attempt.images)
    outcome.write_levels(attempt.folder / storage.levels(attempt.run_id).name)

    def store(session: Session) -> bool:
        # With the news that no heartbeat brought to the database, if it was away.
        last = {name: value for name, value in attempt.news.items() if name != "progress"}
        values = {**last, "metrics": outcome.metrics, "stage": "done", "eta_s": 0.0}
        if not jobs.finish(session, Run, attempt.run_id, attempt.number, **values):
            return jobs.has_succeeded(session, Run, attempt.run_id, attempt.number)
        # From here on the row is locked until the commit: nobody else can end the run or take it over.
        results.store(session, attempt.run_id, outcome.clusters, outcome.assignments())
        _publish(attempt)
        return True

    if settle(store, attempt.stop):
        storage.remove_run_leftovers(attempt.run_id)
        log.info("run_succeeded", run=str(attempt.run_id), attempt=attempt.number)
    else:
        # Cancel came before the finish: exactly one of them wins. Or the run is another attempt's by now.
        _end_cancelled(attempt)


def _publish(attempt: _Attempt) -> None:
    """Give the artefacts the places where they are looked for; twice does no harm."""
    for path in attempt.folder.iterdir():
        if path.name not in _INTERMEDIATE:
            path.replace(storage.run(attempt.run_id) / path.name)
    storage.sync_folder(storage.run(attempt.run_id))
