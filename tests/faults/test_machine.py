"""Any interleaving of what workers, sweepers and users do leaves one truth: against real PostgreSQL.

The machine knows the rules of DESIGN section 3 in a dozen lines of its own and compares after every step.
"""

import uuid
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select, text

from app.config import settings as service
from app.db.session import open_session
from app.db.tables import TERMINAL_STATES, Cluster, Run
from app.errors import Conflict
from app.services import collections, jobs, results, runs
from app.services.results import ClusterRow
from tests.faults.conftest import FULL
from tests.faults.table import Seen

WORKERS = st.integers(0, 2)


class OneRun(RuleBasedStateMachine):
    """Three workers, each of which believes to hold some attempt, for as long as nobody tells it otherwise."""

    @initialize()
    def submit(self) -> None:
        with open_session() as session:
            collection = collections.create(session, "machine")
            session.flush()
            self.run_id = uuid.uuid4()
            session.add(Run(id=self.run_id, collection_id=collection.id, parameters={"clusters": 2}))
            session.commit()
        self.holds = [0, 0, 0]  # 0 is no attempt that ever was
        self.state, self.attempt, self.lost = "queued", 0, 0
        self.asked = self.expired = False
        self.winner: int | None = None
        self.last: dict[str, Any] | None = None  # the row as it ended

    def mine(self, worker: int) -> bool:
        """Whether the worker may still change the run."""
        return self.state == "running" and self.holds[worker] == self.attempt

    @rule(worker=WORKERS)
    def claim(self, worker: int) -> None:
        with open_session() as session:
            run = jobs.claim(session, Run, self.run_id)
            session.commit()
        assert (run is not None) == (self.state == "queued")
        if run is not None:
            self.state, self.attempt, self.expired = "running", self.attempt + 1, False
            self.holds[worker] = run.attempt
            assert run.attempt == self.attempt

    @rule(worker=WORKERS)
    def heartbeat(self, worker: int) -> None:
        with open_session() as session:
            alive = jobs.heartbeat(session, Run, self.run_id, self.holds[worker], progress=0.5)
            session.commit()
        assert alive == self.mine(worker)
        if alive:
            self.expired = False

    @rule(worker=WORKERS, commits=st.booleans(), again=st.booleans())
    def finish(self, worker: int, *, commits: bool, again: bool) -> None:
        """With its results, in one transaction; the database may die before the commit, or before its answer."""
        attempt = self.holds[worker]
        with open_session() as session:
            won = jobs.finish(session, Run, self.run_id, attempt)
            if won:
                row = ClusterRow(
                    cluster=0, name=f"of {attempt}", size=1, confidence=1.0, cohesion=1.0, representatives=[]
                )
                results.store(session, self.run_id, [row], [])
            if commits:
                session.commit()
        assert won == (self.mine(worker) and not self.asked)
        if won and commits:
            self.state, self.winner = "succeeded", attempt
            if again:
                with open_session() as session:
                    assert not jobs.finish(session, Run, self.run_id, attempt)
                    assert jobs.has_succeeded(session, Run, self.run_id, attempt)

    @rule(worker=WORKERS)
    def fail(self, worker: int) -> None:
        with open_session() as session:
            failed = jobs.fail(session, Run, self.run_id, self.holds[worker], {"code": "x", "detail": "x"})
            session.commit()
        assert failed == self.mine(worker)
        self.state = "failed" if failed else self.state

    @rule(worker=WORKERS)
    def release(self, worker: int) -> None:
        with open_session() as session:
            released = jobs.release(session, Run, self.run_id, self.holds[worker])
            session.commit()
        assert released == self.mine(worker)
        if released:
            self.state = "cancelled" if self.asked else "queued"

    @precondition(lambda self: self.asked)
    @rule(worker=WORKERS)
    def answer_the_cancellation(self, worker: int) -> None:
        with open_session() as session:
            ended = jobs.end_cancelled(session, self.run_id, self.holds[worker])
            session.commit()
        assert ended == self.mine(worker)
        self.state = "cancelled" if ended else self.state

    @rule(worker=WORKERS)
    def trainer_killed(self, worker: int) -> None:
        with open_session() as session:
            lost = jobs.expire(session, Run, self.run_id, self.holds[worker])
            session.commit()
        assert lost == self.mine(worker)
        self.expired = self.expired or lost

    @precondition(lambda self: self.state == "running")
    @rule()
    def lease_runs_out(self) -> None:
        with open_session() as session:
            session.execute(text("UPDATE runs SET lease_until = now() - interval '1 s' WHERE state = 'running'"))
            session.commit()
        self.expired = True

    @rule()
    def sweep(self) -> None:
        with open_session() as session:
            found = jobs.requeue_lost(session, Run)
            session.commit()
        lost = self.state == "running" and self.expired
        assert found == ([self.run_id] if lost else [])
        if lost:
            self.lost += 1
            given_up = self.lost >= service().max_attempts
            self.state = "cancelled" if self.asked else "failed" if given_up else "queued"

    @rule()
    def cancel(self) -> None:
        with open_session() as session:
            try:
                runs.cancel(session, self.run_id)
                session.commit()
                accepted = True
            except Conflict:
                accepted = False
        assert accepted == (self.state not in ("succeeded", "failed"))
        if self.state in ("queued", "running"):
            self.asked = True
            self.state = "cancelled" if self.state == "queued" else self.state

    @invariant()
    def there_is_one_truth(self) -> None:
        with open_session() as session:
            row = dict(session.execute(select(Run.__table__).where(Run.id == self.run_id)).mappings().one())
            kept = list(session.scalars(select(Cluster.name).where(Cluster.run_id == self.run_id)))
        assert (row["state"], row["attempt"], row["lost_attempts"]) == (self.state, self.attempt, self.lost)
        assert (row["cancel_requested_at"] is not None) == self.asked
        assert kept == ([f"of {self.winner}"] if self.state == "succeeded" else [])
        if self.last is not None:
            assert row == self.last  # what has ended stays as it is
        elif row["state"] in TERMINAL_STATES:
            self.last = row

    def teardown(self) -> None:
        with open_session() as session:
            session.execute(text("DELETE FROM collections"))
            session.commit()


@pytest.mark.usefixtures("database")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_interleaving_leaves_one_truth(seen: Seen):
    examples = 500 if FULL else 40
    run_state_machine_as_test(OneRun, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None))
    with open_session() as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 0
    seen(
        "claim, heartbeat, expiry, cancel, finish, release in any order", "one truth", f"{examples} orders of 30 steps"
    )
