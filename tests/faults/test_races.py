"""Cancel against finish, against real PostgreSQL: exactly one of them wins."""

import threading
import uuid

import pytest
from sqlalchemy import func, select

from app.db.session import open_session
from app.db.tables import Cluster, Run
from app.errors import Conflict
from app.services import collections, jobs, results, runs
from app.services.results import ClusterRow
from tests.faults.conftest import FULL
from tests.faults.table import Seen

pytestmark = pytest.mark.usefixtures("database")
RACES = 1000 if FULL else 100
ROW = ClusterRow(cluster=0, name="Group 1", size=1, confidence=1.0, cohesion=1.0, representatives=[])


def running_runs(count: int) -> list[uuid.UUID]:
    with open_session() as session:
        collection = collections.create(session, "races")
        session.flush()
        ids = [uuid.uuid4() for _ in range(count)]
        session.add_all(Run(id=identity, collection_id=collection.id, parameters={"clusters": 2}) for identity in ids)
        session.flush()
        for identity in ids:
            assert jobs.claim(session, Run, identity) is not None
        session.commit()
    return ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cancel_against_finish(seen: Seen):
    """The worker's part is that of `worker.supervise`: finish with the results, or else answer the cancellation."""
    ids = running_runs(RACES)
    gate = threading.Barrier(2)
    told: dict[str, list[bool]] = {"worker": [], "user": []}

    def worker() -> None:
        for identity in ids:
            gate.wait()
            with open_session() as session:
                won = jobs.finish(session, Run, identity, 1)
                if won:
                    results.store(session, identity, [ROW], [])
                else:
                    jobs.end_cancelled(session, identity, 1)
                session.commit()
                told["worker"].append(won)

    def user() -> None:
        for identity in ids:
            gate.wait()
            with open_session() as session:
                try:
                    runs.cancel(session, identity)
                    session.commit()
                    told["user"].append(True)
                except Conflict:
                    told["user"].append(False)

    racers = [threading.Thread(target=racer) for racer in (worker, user)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert all(worker_won != user_won for worker_won, user_won in zip(told["worker"], told["user"], strict=True))
    with open_session() as session:
        states = dict(session.execute(select(Run.id, Run.state)).all())
        kept = set(session.scalars(select(Cluster.run_id)))
        assert session.scalar(select(func.count()).select_from(Cluster)) == len(kept)
    for identity, worker_won in zip(ids, told["worker"], strict=True):
        assert states[identity] == ("succeeded" if worker_won else "cancelled")
        assert (identity in kept) == worker_won
    finished = sum(told["worker"])
    assert 0 < finished < RACES  # both did win
    seen(
        f"cancel against finish, {RACES:,} races",
        "exactly one winner",
        f"{finished} finished, {RACES - finished} cancelled, 0 both, 0 neither",
    )


@pytest.mark.slow
def test_cancel_against_release():
    """A run that its worker gives back at the moment of the cancellation is not left in the queue."""
    ids = running_runs(RACES)
    gate = threading.Barrier(2)

    def worker() -> None:
        for identity in ids:
            gate.wait()
            with open_session() as session:
                jobs.release(session, Run, identity, 1)
                session.commit()

    def user() -> None:
        for identity in ids:
            gate.wait()
            with open_session() as session:
                runs.cancel(session, identity)
                session.commit()

    racers = [threading.Thread(target=racer) for racer in (worker, user)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    with open_session() as session:
        assert set(session.scalars(select(Run.state))) == {"cancelled"}
