"""Verbs on runs."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import case, func, select, true, update
from sqlalchemy.orm import Session, aliased

from app.db.tables import TERMINAL_STATES, Collection, Image, Run, Upload
from app.errors import Conflict, Invalid, not_found
from app.services import collections, images, pages, quotas
from app.services.parameters import Parameters, check_weights, least_images


def create(
    session: Session,
    collection_id: uuid.UUID,
    parameters: Parameters,
    *,
    after_upload: uuid.UUID | None = None,
) -> Run:
    """Queue a run. With `after_upload` it starts when that upload is done; else the images must be there."""
    collection = collections.lock(session, collection_id)
    check(session, collection.tenant_id, parameters)
    if after_upload is None:
        _check_ready(session, collection_id, parameters.clusters)
    run = Run(
        id=uuid.uuid4(),
        collection_id=collection_id,
        upload_id=after_upload,
        parameters=parameters.model_dump(mode="json"),
    )
    session.add(run)
    session.flush()
    session.refresh(run)
    return run


def check(session: Session, tenant_id: uuid.UUID, parameters: Parameters) -> None:
    """Raise `Invalid` or `TooMany` where a tenant cannot have such a run, whatever it would be over."""
    check_weights(parameters.weights)
    quotas.check_queue(session, tenant_id)


def _check_ready(session: Session, collection_id: uuid.UUID, clusters: int | Literal["auto"]) -> None:
    busy = session.scalar(
        select(Upload.id)
        .where(Upload.collection_id == collection_id, Upload.state.in_(collections.OPEN_STATES))
        .limit(1)
    )
    if busy is not None:
        raise Conflict(
            f"The collection is still taking in upload {busy}; start the run when that has succeeded.",
            code="collection-busy",
        )
    check_enough(clusters, images.count(session, collection_id))


def check_enough(clusters: int | Literal["auto"], found: int) -> None:
    """Raise `Invalid` when a collection of `found` images cannot be grouped so."""
    if found >= least_images(clusters):
        return
    what = "Grouping needs" if clusters == "auto" else f"{clusters} clusters need"
    raise Invalid(
        f"{what} at least {least_images(clusters)} images; the collection has {found}.",
        code="too-few-images",
        fields={} if clusters == "auto" else {"clusters": f"at most {found} for this collection"},
    )


def clusters_of(run: Run) -> int | None:
    """How many groups a run forms: as asked or, where that was left to the run, as found; None until then."""
    asked: Any = run.parameters["clusters"]
    if asked != "auto":
        return int(asked)
    found = ((run.metrics or {}).get("auto") or {}).get("clusters")
    return None if found is None else int(found)


def get(session: Session, run_id: uuid.UUID) -> Run:
    run = session.get(Run, run_id)
    if run is None:
        raise not_found("run", run_id)
    return run


def get_succeeded(session: Session, run_id: uuid.UUID) -> Run:
    """A run whose results can be read."""
    run = get(session, run_id)
    if run.state != "succeeded":
        raise Conflict(f"Run {run_id} has no results: its state is {run.state}.", code="run-without-results")
    return run


def list_page(session: Session, collection_id: uuid.UUID, limit: int, cursor: str | None) -> pages.Page[Run]:
    """Newest first."""
    collections.get(session, collection_id)
    return pages.newest_first(session, Run, limit, cursor, Run.collection_id == collection_id)


def latest(session: Session, collection_ids: Sequence[uuid.UUID], each: int) -> dict[uuid.UUID, list[Run]]:
    """The newest runs of each collection, newest first."""
    newest = (
        select(Run)
        .where(Run.collection_id == Collection.id)
        .order_by(Run.created_at.desc(), Run.id.desc())
        .limit(each)
        .lateral()
    )
    table = aliased(Run, newest)
    found: dict[uuid.UUID, list[Run]] = {collection_id: [] for collection_id in collection_ids}
    rows = session.scalars(
        select(table)
        .select_from(Collection)
        .join(newest, true())
        .where(Collection.id.in_(collection_ids))
        .order_by(table.created_at.desc(), table.id.desc())
    )
    for row in rows:
        found[row.collection_id].append(row)
    return found


def cancel(session: Session, run_id: uuid.UUID) -> Run:
    """A queued run ends at once; a running one is asked to, and its worker answers within seconds."""
    queued = Run.state == "queued"
    # One statement: between two, a worker could give the run back, and neither would meet it.
    session.execute(
        update(Run)
        .where(Run.id == run_id, Run.state.in_(collections.OPEN_STATES))
        .values(
            state=case((queued, "cancelled"), else_=Run.state),
            cancel_requested_at=func.coalesce(Run.cancel_requested_at, func.now()),
            finished_at=case((queued, func.now())),
        )
        .execution_options(synchronize_session=False)
    )
    run = session.get(Run, run_id, populate_existing=True)
    if run is None:
        raise not_found("run", run_id)
    if run.state in TERMINAL_STATES and run.state != "cancelled":
        raise Conflict(f"Run {run_id} is over: it has {run.state}.", code="run-over")
    return run


def cancel_requested(session: Session, run_id: uuid.UUID) -> bool:
    return session.scalar(select(Run.cancel_requested_at).where(Run.id == run_id)) is not None


def trainer_images(session: Session, run: Run) -> list[tuple[uuid.UUID, str, str]]:
    """Id, SHA-256 and filename of each image that the run is over, in the order of the collection.

    These are the images of uploads that were done when the run first started: every attempt sees the same, and an
    upload that is still under way may yet fail and take its images back.
    """
    rows = session.execute(
        select(Image.id, Image.sha256, Image.filename)
        .join(Upload, Upload.id == Image.upload_id)
        .where(
            Image.collection_id == run.collection_id,
            Upload.state == "succeeded",
            Upload.finished_at <= run.started_at,
        )
        .order_by(Image.number)
    )
    return [(row.id, row.sha256, row.filename) for row in rows]
