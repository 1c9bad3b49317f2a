import re
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import queue
from app.access import Caller, GuardedRoute
from app.api.deps import CallerOf, Cursor, DatabaseSession, IdempotencyKeyHeader, Limit
from app.api.download import CSV, Bom, download
from app.api.problems import responses
from app.api.receive import Received, receive
from app.api.replay import stream_digest
from app.api.schemas import LedgerRow, NewCollection, PageOf, RunOut, UploadOut, is_shown
from app.db.session import tenant_session
from app.db.tables import IdempotencyKey
from app.errors import Invalid
from app.services import collections, idempotency, quotas, runs, uploads
from app.services.parameters import Parameters
from app.services.uploads import ReceivedPart

router = APIRouter(prefix="/v1", tags=["uploads"], route_class=GuardedRoute)

_ARCHIVE_SUFFIX = re.compile(r"\.(?:zip|tar|tgz|tar\.gz)$", re.IGNORECASE)

_FILE: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": "One archive (zip, tar, tar.gz), or images; a folder in a name is kept.",
}


def _multipart(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


_ONE_SHOT_FORM = _multipart(
    {
        "file": _FILE,
        "name": {
            "type": "string",
            "description": "Name of the new collection; unset: that of the folder or the archive that is sent.",
        },
        **Parameters.model_json_schema()["properties"],
    },
    ["file", "clusters"],
)


@router.post(
    "/collections/{collection_id}/uploads",
    status_code=202,
    response_model=UploadOut,
    openapi_extra=_multipart({"file": _FILE}, ["file"]),
    responses=responses(404, 409, 413, 422, 507),
)
async def create_upload(
    collection_id: uuid.UUID, request: Request, caller: CallerOf, key: IdempotencyKeyHeader = None
) -> JSONResponse:
    """Add images to a collection. The answer comes once everything is received; poll `Location`."""

    def check(session: Session) -> None:
        collections.get(session, collection_id)

    def create(session: Session, received: Received) -> UploadOut:
        unknown = sorted(received.fields)
        if unknown:
            raise Invalid(
                f"An upload takes no form field {unknown[0]!r}.",
                code="invalid-input",
                fields=dict.fromkeys(unknown, "unknown"),
            )
        return UploadOut.of(uploads.create(session, received.upload_id, collection_id, received.parts))

    return await _receive_and_store(request, caller, key, check, create)


@router.get("/collections/{collection_id}/uploads", responses=responses(404, 422))
def list_uploads(
    collection_id: uuid.UUID, session: DatabaseSession, limit: Limit = 50, cursor: Cursor = None
) -> PageOf[UploadOut]:
    """The uploads into a collection, newest first."""
    page = uploads.list_page(session, collection_id, limit, cursor)
    return PageOf(items=[UploadOut.of(row) for row in page.items], next=page.next)


@router.post(
    "/cluster",
    status_code=202,
    response_model=RunOut,
    openapi_extra=_ONE_SHOT_FORM,
    tags=["runs"],
    responses=responses(409, 413, 422, 507),
)
async def cluster(request: Request, caller: CallerOf, key: IdempotencyKeyHeader = None) -> JSONResponse:
    """The one-shot: images in, a collection, an upload and a run out. Poll `Location`."""

    def check(_session: Session) -> None:
        pass

    def create(session: Session, received: Received) -> RunOut:
        # HTML forms send what is left empty as an empty string.
        fields = {name: value for name, value in received.fields.items() if value != ""}
        name = fields.pop("name", None) or _name_of(received.parts)
        try:
            new = NewCollection(name=name)
            parameters = Parameters.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        collection = collections.create(session, new.name)
        uploads.create(session, received.upload_id, collection.id, received.parts)
        return RunOut.of(runs.create(session, collection.id, parameters, after_upload=received.upload_id))

    return await _receive_and_store(request, caller, key, check, create)


def _name_of(parts: Sequence[ReceivedPart]) -> str:
    """For a collection: the folder that its first file lies in, or that file's own name without an archive's suffix.

    Loose pictures are so many images: the first one's name says nothing of the others.
    """
    folder, within, _ = parts[0].filename.lstrip("/").partition("/")
    if not within and len(parts) > 1 and not _ARCHIVE_SUFFIX.search(folder):
        return f"{len(parts)} images"
    name = folder if within else _ARCHIVE_SUFFIX.sub("", folder)
    return "".join(filter(is_shown, name)).strip()[:200] or "images"


async def _receive_and_store(
    request: Request,
    caller: Caller,
    key: str | None,
    check: Callable[[Session], None],
    create: Callable[[Session, Received], UploadOut | RunOut],
) -> JSONResponse:
    request_digest = stream_digest(request)

    def recall() -> IdempotencyKey | None:
        with tenant_session(caller.tenant_id) as session:
            check(session)
            known = idempotency.recall(session, key, request_digest)
            if known is None:
                declared = request.headers.get("content-length", "")
                quotas.check_room(session, caller.tenant_id, int(declared) if declared.isdecimal() else 0)
            return known

    known = await run_in_threadpool(recall)
    if known is not None:
        return _accepted(known.body, known.location)
    received = await receive(request)

    def store() -> JSONResponse:
        with tenant_session(caller.tenant_id) as session:
            try:
                answer = create(session, received)
                body, location = answer.model_dump(mode="json"), answer.links["self"]
                idempotency.remember(session, key, request_digest, status=202, location=location, body=body)
            except BaseException:
                received.discard()
                raise
            # When the commit itself breaks, nobody knows whether the row is there: the files stay, and
            # workers remove what no row names.
            session.commit()
        queue.ring_upload(received.upload_id)
        return _accepted(body, location)

    return await run_in_threadpool(store)


def _accepted(body: dict[str, Any], location: str) -> JSONResponse:
    return JSONResponse(body, status_code=202, headers={"Location": location, "Retry-After": "1"})


@router.get("/uploads/{upload_id}", responses=responses(404, 422))
def get_upload(upload_id: uuid.UUID, session: DatabaseSession) -> UploadOut:
    """State, progress and counts."""
    return UploadOut.of(uploads.get(session, upload_id))


@router.get("/uploads/{upload_id}/files", responses=responses(404, 422))
def list_upload_files(
    upload_id: uuid.UUID,
    session: DatabaseSession,
    limit: Limit = 100,
    cursor: Cursor = None,
    outcome: Annotated[
        Literal["accepted", "duplicate", "rejected"] | None, Query(description="Only rows with this outcome.")
    ] = None,
) -> PageOf[LedgerRow]:
    """The ledger: a row for every file received, in the order of arrival."""
    page = uploads.ledger_page(session, upload_id, limit, cursor, outcome)
    return PageOf(items=[LedgerRow.of(row) for row in page.items], next=page.next)


@router.get(
    "/uploads/{upload_id}/files.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}}, **responses(404, 422, 507)},
)
def get_upload_files_csv(upload_id: uuid.UUID, session: DatabaseSession, *, bom: Bom = False) -> StreamingResponse:
    """The whole ledger."""
    uploads.get(session, upload_id)
    return download(uploads.ledger_csv(session, upload_id), f"ledger-{upload_id}.csv", CSV, bom=bom)
