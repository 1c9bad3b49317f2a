"""The state machine of runs and uploads, against real PostgreSQL."""

import threading
import uuid
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app.db.session import open_session
from app.db.tables import Run, Upload
from app.services import collections, jobs, ledger, runs, uploads
from app.services.ledger import NewImage
from app.services.parameters import Parameters
from app.services.uploads import ReceivedPart

pytestmark = pytest.mark.usefixtures("database")


def queued_run() -> uuid.UUID:
    with open_session() as session:
        collection = collections.create(session, "test")
        session.flush()
        run = Run(id=uuid.uuid4(), collection_id=collection.id, parameters={"clusters": 2})
        session.add(run)
        session.commit()
        return run.id


def read(run_id: uuid.UUID) -> Run:
    with open_session() as session:
        return runs.get(session, run_id)


def let_lease_run_out(run_id: uuid.UUID) -> None:
    with open_session() as session:
        session.execute(text("UPDATE runs SET lease_until = now() - interval '1 s' WHERE id = :id"), {"id": run_id})
        session.commit()


def test_fifty_messages_make_one_claim():
    run_id = queued_run()
    claims = []

    def claim() -> None:
        with open_session() as session:
            run = jobs.claim(session, Run, run_id)
            session.commit()
            claims.append(run is not None)

    threads = [threading.Thread(target=claim) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [False] * 49 + [True]
    assert read(run_id).attempt == 1


def test_an_attempt_that_lost_its_lease_can_change_nothing():
    run_id = queued_run()
    with open_session() as session:
        assert jobs.claim(session, Run, run_id) is not None
        session.commit()
    let_lease_run_out(run_id)
    with open_session() as session:
        assert jobs.requeue_lost(session, Run) == [run_id]
        second = jobs.claim(session, Run, run_id)
        session.commit()
        assert second is not None
        assert second.attempt == 2
        assert not jobs.heartbeat(session, Run, run_id, 1, progress=0.5)
        assert not jobs.finish(session, Run, run_id, 1)
        assert not jobs.fail(session, Run, run_id, 1, {"code": "x", "detail": "x"})
        assert not jobs.end_cancelled(session, run_id, 1)
        assert jobs.heartbeat(session, Run, run_id, 2, progress=0.25)
        assert jobs.finish(session, Run, run_id, 2)
        session.commit()
    assert read(run_id).state == "succeeded"


def test_three_lost_attempts_fail_the_run():
    run_id = queued_run()
    for _ in range(3):
        with open_session() as session:
            assert jobs.claim(session, Run, run_id) is not None
            session.commit()
        let_lease_run_out(run_id)
        with open_session() as session:
            jobs.requeue_lost(session, Run)
            session.commit()
    run = read(run_id)
    assert run.state == "failed"
    assert run.problem is not None
    assert run.problem["code"] == "worker_lost"
    assert "3 times" in run.problem["detail"]


def test_a_run_that_was_to_stop_is_cancelled_even_when_it_is_lost_for_the_last_time():
    run_id = queued_run()
    with open_session() as session:
        run = jobs.claim(session, Run, run_id)
        assert run is not None
        run.lost_attempts = 2
        runs.cancel(session, run_id)
        session.commit()
    let_lease_run_out(run_id)
    with open_session() as session:
        assert jobs.requeue_lost(session, Run) == [run_id]
        session.commit()
    run = read(run_id)
    assert (run.state, run.lost_attempts, run.problem) == ("cancelled", 3, None)


def test_what_waits_longest_is_rung_for_first():
    made = [queued_run() for _ in range(3)]
    with open_session() as session:
        for hours, run_id in zip((2, 3, 1), made, strict=True):
            runs.get(session, run_id).created_at -= timedelta(hours=hours)
        session.commit()
        assert jobs.waiting(session, Run, 10.0) == [made[1], made[0], made[2]]
        assert jobs.waiting(session, Run, 10.0, limit=1) == [made[1]]


def test_a_lost_job_whose_row_is_locked_keeps_the_others_not_waiting():
    """As of a worker that was frozen within its last transaction."""
    frozen, other = queued_run(), queued_run()
    with open_session() as session:
        assert jobs.claim(session, Run, frozen) is not None
        assert jobs.claim(session, Run, other) is not None
        session.commit()
    let_lease_run_out(frozen)
    let_lease_run_out(other)
    with open_session() as holder, open_session() as sweeper:
        assert jobs.finish(holder, Run, frozen, 1)
        sweeper.execute(text("SET LOCAL lock_timeout = '5s'"))
        assert jobs.requeue_lost(sweeper, Run) == [other]
        sweeper.commit()
        holder.rollback()
    with open_session() as session:
        assert jobs.requeue_lost(session, Run) == [frozen]
        session.commit()


def test_what_a_vanished_process_holds_is_given_up_by_the_server():
    with open_session() as session:
        names = ("idle_in_transaction_session_timeout", "tcp_keepalives_count")
        shown = [session.scalar(text(f"SELECT setting FROM pg_settings WHERE name = '{name}'")) for name in names]
    assert shown[0] == "300000"  # ms
    assert shown[1] in {"0", "4"}  # 0 on a socket of this machine


def test_a_release_is_not_a_lost_attempt():
    run_id = queued_run()
    with open_session() as session:
        for attempt in range(1, 6):
            assert jobs.claim(session, Run, run_id) is not None
            assert jobs.release(session, Run, run_id, attempt)
        session.commit()
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 0)


def test_cancel_against_finish_has_one_winner():
    for _ in range(20):
        run_id = queued_run()
        with open_session() as session:
            jobs.claim(session, Run, run_id)
            session.commit()
        won = []

        def finish(run_id: uuid.UUID = run_id, won: list[bool] = won) -> None:
            with open_session() as session:
                won.append(jobs.finish(session, Run, run_id, 1))
                session.commit()

        def cancel(run_id: uuid.UUID = run_id) -> None:
            with open_session() as session:
                try:
                    runs.cancel(session, run_id)
                    session.commit()
                except runs.Conflict:
                    session.rollback()

        racers = [threading.Thread(target=finish), threading.Thread(target=cancel)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        run = read(run_id)
        assert won == [run.cancel_requested_at is None]
        assert run.state == ("succeeded" if won[0] else "running")


def test_a_run_waits_for_its_upload_and_fails_with_it():
    with open_session() as session:
        collection = collections.create(session, "one shot")
        upload = uploads.create(session, uuid.uuid4(), collection.id, [ReceivedPart(filename="a.zip", bytes=1)])
        run = runs.create(session, collection.id, Parameters(clusters=2), after_upload=upload.id)
        session.commit()
        assert jobs.claim(session, Run, run.id) is None
        assert jobs.claim(session, Upload, upload.id) is not None
        assert jobs.claim(session, Run, run.id) is None
        jobs.fail(session, Upload, upload.id, 1, {"code": "empty-archive", "detail": "a.zip is empty."})
        assert jobs.fail_runs_of_failed_uploads(session) == [run.id]
        session.commit()
    failed = read(run.id)
    assert failed.state == "failed"
    assert failed.problem == {"code": "upload-failed", "detail": "The upload failed: a.zip is empty."}


def test_uploads_of_a_collection_take_turns():
    with open_session() as session:
        collection = collections.create(session, "two")
        session.commit()
        first, second = (
            uploads.create(session, uuid.uuid4(), collection.id, [ReceivedPart(filename="a", bytes=1)])
            for _ in range(2)
        )
        session.execute(
            text("UPDATE uploads SET created_at = created_at + interval '1 s' WHERE id = :id"),
            {"id": second.id},
        )
        session.commit()
        assert jobs.claim(session, Upload, second.id) is None
        assert jobs.claim(session, Upload, first.id) is not None
        assert jobs.claim(session, Upload, second.id) is None
        assert jobs.finish(session, Upload, first.id, 1)
        assert jobs.claim(session, Upload, second.id) is not None
        session.commit()


def test_every_attempt_sees_the_same_images_whatever_ends_while_a_run_starts():
    run_id = queued_run()
    with open_session() as session:
        collection_id = runs.get(session, run_id).collection_id
        upload = uploads.create(session, uuid.uuid4(), collection_id, [ReceivedPart(filename="a", bytes=1)])
        assert jobs.claim(session, Upload, upload.id) is not None
        image = NewImage(id=uuid.uuid4(), sha256="a" * 64, filename="a.png", bytes=1, width=1, height=1, format="PNG")
        ledger.add(session, collection_id, upload.id, [image], [])
        session.commit()
    seen = []

    def start() -> None:
        with open_session() as session:
            run = jobs.claim(session, Run, run_id)
            assert run is not None
            seen.append(runs.trainer_images(session, run))
            session.commit()

    with open_session() as finishing:
        assert jobs.finish(finishing, Upload, upload.id, 1)
        starting = threading.Thread(target=start)
        starting.start()
        starting.join(timeout=0.5)
        finishing.commit()
        starting.join()
    with open_session() as session:
        assert jobs.release(session, Run, run_id, 1)
        session.commit()
    start()
    first, second = seen
    assert len(first) == 1
    assert first == second


STEPS = st.lists(
    st.sampled_from(["claim", "beat", "expire", "sweep", "cancel", "finish", "fail", "release", "answer"]),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_events_leaves_one_truth(steps):
    """Terminal states stay, attempts only grow, only what runs has an ETA, and no CHECK constraint is ever hit."""
    run_id = queued_run()
    attempt = 0
    ended: str | None = None
    for step in steps:
        with open_session() as session:
            if step == "claim":
                run = jobs.claim(session, Run, run_id)
                attempt = run.attempt if run else attempt
            elif step == "beat":
                jobs.heartbeat(session, Run, run_id, attempt, progress=0.5, eta_s=5.0)
            elif step == "expire":
                jobs.expire(session, Run, run_id, attempt)
            elif step == "sweep":
                jobs.requeue_lost(session, Run)
            elif step == "cancel":
                try:
                    runs.cancel(session, run_id)
                except runs.Conflict:
                    session.rollback()
            elif step == "finish":
                jobs.finish(session, Run, run_id, attempt, eta_s=None)
            elif step == "fail":
                jobs.fail(session, Run, run_id, attempt, {"code": "x", "detail": "x"}, eta_s=None)
            elif step == "release":
                jobs.release(session, Run, run_id, attempt)
            else:
                run = runs.get(session, run_id)
                if run.cancel_requested_at is not None:
                    jobs.end_cancelled(session, run_id, attempt)
            session.commit()
        run = read(run_id)
        assert run.attempt >= attempt
        if ended is not None:
            assert run.state == ended
        ended = run.state if run.state in ("succeeded", "failed", "cancelled") else None
        assert not (run.state == "succeeded" and run.cancel_requested_at is not None)
        assert run.state == "running" or run.eta_s is None
