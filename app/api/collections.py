import uuid

from fastapi import APIRouter, BackgroundTasks, Response

from app import storage
from app.access import GuardedRoute
from app.api.deps import Cursor, DatabaseSession, IdempotencyKeyHeader, Limit
from app.api.problems import responses
from app.api.replay import digest
from app.api.schemas import CollectionOut, ImageOut, NewCollection, PageOf
from app.services import collections, idempotency, images

router = APIRouter(prefix="/v1/collections", tags=["collections"], route_class=GuardedRoute)


@router.post("", status_code=201, responses=responses(400, 409, 413, 422))
def create_collection(
    new: NewCollection, response: Response, session: DatabaseSession, key: IdempotencyKeyHeader = None
) -> CollectionOut:
    """Make an empty collection."""
    request_digest = digest("POST", "/v1/collections", new.model_dump_json())
    known = idempotency.recall(session, key, request_digest)
    if known is not None:
        response.headers["Location"] = known.location
        return CollectionOut.model_validate(known.body)
    created = CollectionOut.of(collections.create(session, new.name))
    location = created.links["self"]
    idempotency.remember(
        session, key, request_digest, status=201, location=location, body=created.model_dump(mode="json")
    )
    session.commit()
    response.headers["Location"] = location
    return created


@router.get("", responses=responses(422))
def list_collections(session: DatabaseSession, limit: Limit = 50, cursor: Cursor = None) -> PageOf[CollectionOut]:
    """All collections, newest first."""
    page = collections.list_page(session, limit, cursor)
    return PageOf(items=[CollectionOut.of(view) for view in page.items], next=page.next)


@router.get("/{collection_id}", responses=responses(404, 422))
def get_collection(collection_id: uuid.UUID, session: DatabaseSession) -> CollectionOut:
    return CollectionOut.of(collections.get(session, collection_id))


@router.delete("/{collection_id}", status_code=204, responses=responses(404, 409, 422))
def delete_collection(collection_id: uuid.UUID, session: DatabaseSession, afterwards: BackgroundTasks) -> None:
    """Delete a collection with its images, uploads, runs and files. Not while work on it is under way."""
    runs = collections.remove(session, collection_id)
    with storage.deletion(collection_id, runs) as graves:
        session.commit()
    for grave in graves:
        afterwards.add_task(storage.remove, grave)


@router.get("/{collection_id}/images", tags=["images"], responses=responses(404, 422))
def list_images(
    collection_id: uuid.UUID, session: DatabaseSession, limit: Limit = 100, cursor: Cursor = None
) -> PageOf[ImageOut]:
    """The images of a collection, in the order of their arrival."""
    page = images.list_page(session, collection_id, limit, cursor)
    return PageOf(items=[ImageOut.of(row) for row in page.items], next=page.next)
