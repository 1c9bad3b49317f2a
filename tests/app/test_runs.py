import uuid
from datetime import UTC, datetime, timedelta

from app.db.session import open_session
from app.db.tables import Run
from app.services import collections, runs


def test_of_each_collection_the_latest_runs_come_newest_first(database: None):
    now = datetime.now(UTC)
    with open_session() as session:
        of = [collections.create(session, name).id for name in ("one", "other")]
        session.flush()
        made = [
            Run(id=uuid.uuid4(), collection_id=of[day % 2], parameters={}, created_at=now + timedelta(days=day))
            for day in range(6)
        ]
        session.add_all(made)
        session.flush()
        found = runs.latest(session, of, 2)
    assert found == {of[0]: [made[4], made[2]], of[1]: [made[5], made[3]]}
