from sqlalchemy import select, update

from app.db.session import open_session
from app.db.tables import Cluster, Image
from app.services import results
from tests.app.test_web import finished_run


def test_each_run_has_its_own_results_in_their_order(database: None):
    small, large = finished_run(images=3), finished_run(images=5)
    with open_session() as session:
        session.execute(update(Cluster).where(Cluster.run_id == small.id).values(name="Of the small run"))
        session.commit()
        for run, name in ((small, "Of the small run"), (large, "Group 1")):
            query = select(Image.id).where(Image.collection_id == run.collection_id).order_by(Image.sha256)
            ids = session.scalars(query).all()
            found = results.clusters(session, run.id, 10, None).items
            assert [view.representatives for view in found] == [ids, ids[-1:]]
            members = results.members(session, run.id, 0, 10, None).items
            assert [member.image_id for member in members] == ids[:-1]
            assert results.names(session, run.id, [0]) == {0: name}
            assert results.faces(session, run.id, [0, 1]) == {0: ids[0], 1: ids[-1]}
