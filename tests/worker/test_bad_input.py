"""What cannot be grouped ends as one clear problem on the run: real trainers on tiny collections.

Every method and every kind of weights file is gone through in `tests/models`; here is what becomes of their errors.
"""

import errno
import hashlib
import io
import threading
import uuid
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
from sqlalchemy import func, text

from app import storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Image, Run, Upload
from app.services import collections, results, runs
from app.services.parameters import Parameters
from models.networks import SlimResNet
from tests.pictures import encoded, picture, zip_of
from tests.worker.ingested import queued
from tests.worker.test_supervise import collection_of, new_run, read
from worker.ingest import ingest
from worker.supervise import supervise

pytestmark = pytest.mark.usefixtures("database")

TINY = {"image_size": 64, "epochs": 2, "restarts": 2}


def after(run_id: uuid.UUID) -> Run:
    """The run once it is over."""
    supervise(run_id, threading.Event())
    return read(run_id)


def problem_of(run_id: uuid.UUID) -> dict[str, str]:
    run = after(run_id)
    assert run.state == "failed"
    assert run.attempt == 1
    assert run.problem is not None
    assert "Traceback" not in run.problem["detail"]
    assert len(run.problem["detail"].splitlines()) == 1
    assert str(settings().data_dir) not in run.problem["detail"]
    return run.problem


def copies(count: int) -> uuid.UUID:
    """A collection of files that all show the same pixels."""
    with open_session() as session:
        collection = collections.create(session, "the same")
        upload = Upload(
            id=uuid.uuid4(), collection_id=collection.id, bytes=0, state="succeeded", finished_at=func.now()
        )
        session.add(upload)
        session.flush()
        for number in range(count):
            content = picture(0) + bytes([number])
            sha256 = hashlib.sha256(content).hexdigest()
            with storage.atomic_write(storage.original(collection.id, sha256)) as file:
                file.write(content)
            session.add(
                Image(
                    id=uuid.uuid4(), collection_id=collection.id, upload_id=upload.id, sha256=sha256,
                    filename=f"{number}.png", format="PNG", width=40, height=30, bytes=len(content),
                )
            )  # fmt: skip
        session.commit()
        return collection.id


def weights_folder() -> Path:
    folder = settings().data_dir / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_one_image_a_thousand_times_is_one_image():
    content = picture(1)
    upload_id = queued(("same.zip", zip_of({f"{number}.png": content for number in range(1000)})))
    with open_session() as session:
        collection_id = session.get_one(Upload, upload_id).collection_id
        run = runs.create(session, collection_id, Parameters(clusters=2), after_upload=upload_id)
        automatic = runs.create(session, collection_id, Parameters(clusters="auto"), after_upload=upload_id)
        session.commit()
    ingest(upload_id, threading.Event())
    for run_id, detail in (
        (run.id, "2 clusters need at least 2 images; the collection has 1."),
        (automatic.id, "Grouping needs at least 2 images; the collection has 1."),
    ):
        assert read(run_id).problem == {"code": "too-few-images", "detail": detail}  # no worker had to begin


def test_images_that_became_too_few_while_a_run_waited():
    with open_session() as session:
        run = Run(id=uuid.uuid4(), collection_id=collection_of(2), parameters={"clusters": 3})
        session.add(run)
        session.commit()
    assert problem_of(run.id) == {
        "code": "too-few-images",
        "detail": "3 clusters need at least 3 images; the collection has 2.",
    }


def test_weights_that_went_away_since_they_were_named():
    folder = weights_folder()
    (folder / "net.pth").write_bytes(b"tensors")
    run_id = new_run(collection_of(4), backbone="resnet10_slim", weights="net.pth")
    (folder / "net.pth").unlink()
    assert problem_of(run_id) == {
        "code": "weights-not-found",
        "detail": "There is no weights file 'net.pth' in the service's weights folder.",
    }


def test_a_disk_without_room_for_a_run(monkeypatch: pytest.MonkeyPatch):
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_session() as session:
        run = Run(id=uuid.uuid4(), collection_id=collection_of(4), parameters={"clusters": 2})
        session.add(run)
        session.commit()
    monkeypatch.setattr(storage, "atomic_write", full)
    assert problem_of(run.id)["code"] == "storage-full"


@pytest.mark.slow
def test_two_images_are_two_groups():
    run_id = new_run(collection_of(2), **TINY)
    run = after(run_id)
    assert run.state == "succeeded", run.problem
    with open_session() as session:
        assert results.sizes(session, run_id) == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scl", "kmeans_pixels"])
def test_images_that_are_all_equal(method: str):
    found = problem_of(new_run(copies(6), method=method, **TINY))
    assert found["code"] == "invalid-collection"
    assert "only 1 differ" in found["detail"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "backbone", "words"),
    [
        ("text.pth", b"hello", "resnet10_slim", "weights file text.pth is no file of tensors"),
        ("slim.safetensors", None, "timm/resnet1818", "backbone 'timm/resnet1818' is unknown to timm; did you mean"),
    ],
)
def test_a_backbone_that_cannot_be_loaded(name: str, content: bytes | None, backbone: str, words: str):
    path = weights_folder() / name
    path.write_bytes(content or safetensors.torch.save(SlimResNet().state_dict()))
    found = problem_of(new_run(collection_of(4), backbone=backbone, weights=name, **TINY))
    assert found["code"] == "invalid-backbone"
    assert words in found["detail"]


@pytest.mark.slow
def test_a_weights_file_that_fits_is_used_and_named_without_its_folder():
    content = safetensors.torch.save(SlimResNet().state_dict())
    (weights_folder() / "slim.safetensors").write_bytes(content)
    run = after(new_run(collection_of(6), backbone="resnet10_slim", weights="slim.safetensors", **TINY))
    assert run.state == "succeeded", run.problem
    assert run.parameters["weights"] == "slim.safetensors"
    assert run.provenance is not None
    assert run.provenance["backbone_sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
def test_a_run_from_before_there_were_weights_to_name():
    run_id = new_run(collection_of(4), method="kmeans", **TINY)
    with open_session() as session:
        session.execute(text("UPDATE runs SET parameters = parameters - 'weights'"))
        session.commit()
    assert after(run_id).state == "succeeded"


@pytest.mark.slow
def test_two_images_whose_number_of_groups_is_to_be_found():
    run = after(new_run(collection_of(2), clusters="auto", **TINY))
    assert run.state == "succeeded", run.problem
    assert runs.clusters_of(run) == 2


@pytest.mark.slow
def test_images_that_are_all_equal_have_no_number_of_groups():
    assert problem_of(new_run(copies(6), clusters="auto", **TINY))["code"] == "invalid-collection"


@pytest.mark.slow
def test_what_the_ingest_accepts_can_be_grouped():
    """Broken metadata and odd kinds of numbers: good pictures all the same."""
    exif = b"MM\0*\0\0"
    wide = np.linspace(0, 1, 40 * 30, dtype=np.float32).reshape(30, 40)
    files = {f"{number}.png": picture(number, kind=number % 2) for number in range(6)}
    files["exif.png"] = encoded(PIL.Image.open(io.BytesIO(picture(7))), "PNG", exif=exif)
    files["float.tif"] = encoded(PIL.Image.fromarray(wide), "TIFF")
    files["int.tif"] = encoded(PIL.Image.fromarray((wide * 1e9).astype(np.int32)), "TIFF")
    upload_id = queued(("odd.zip", zip_of(files)))
    with open_session() as session:
        collection_id = session.get_one(Upload, upload_id).collection_id
        run_id = runs.create(session, collection_id, Parameters(clusters=2, **TINY), after_upload=upload_id).id
        session.commit()
    ingest(upload_id, threading.Event())
    run = after(run_id)
    assert run.state == "succeeded", run.problem
    with open_session() as session:
        assert sum(results.sizes(session, run_id)) == 9
