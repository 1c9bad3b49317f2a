"""What a sweeper deletes, and what it must not."""

import os
import uuid
from pathlib import Path

import pytest

from app import storage
from app.db.session import open_session
from app.db.tables import Run
from app.services import jobs, runs
from tests.pictures import picture, two_kinds, zip_of
from tests.worker.ingested import queued, run
from worker.sweep import remove_leftovers, remove_orphans

pytestmark = pytest.mark.usefixtures("database")


def grown_old(folder: Path) -> Path:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))
    return folder


def test_received_files_go_once_they_are_old_and_no_open_upload_names_them():
    waiting = grown_old(storage.incoming(queued(("a.png", picture(1)))))
    orphan, young = (storage.incoming(uuid.uuid4()) for _ in range(2))
    for folder in (orphan, young):
        folder.mkdir()
        (folder / "000000").write_bytes(b"received")
    grown_old(orphan)
    remove_orphans()
    assert sorted(storage.all_incoming()) == sorted([waiting, young])


def claimed(run_id: uuid.UUID) -> list[str]:
    """The names of the images that an attempt is over."""
    with open_session() as session:
        attempt = jobs.claim(session, Run, run_id)
        assert attempt is not None
        found = [name for _, _, name in runs.trainer_images(session, attempt)]
        session.commit()
        return found


def released(run_id: uuid.UUID) -> None:
    with open_session() as session:
        assert jobs.release(session, Run, run_id, 1)
        session.commit()


def test_a_run_that_goes_on_has_its_checkpoint_and_its_images_whatever_came_meanwhile():
    files = two_kinds(8)
    first = dict(list(files.items())[:6])
    collection_id = run(queued(("a.zip", zip_of(first)))).collection_id
    run_id = uuid.uuid4()
    with open_session() as session:
        session.add(Run(id=run_id, collection_id=collection_id, parameters={"clusters": 2}))
        session.commit()
    assert claimed(run_id) == list(first)
    storage.checkpoint(run_id).mkdir(parents=True)
    assert run(queued(("b.zip", zip_of(files)), collection_id=collection_id)).accepted == 2
    released(run_id)
    remove_leftovers()
    assert storage.checkpoint(run_id).exists()
    assert claimed(run_id) == list(first)
