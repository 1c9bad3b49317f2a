import uuid
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from app import storage
from app.access import GuardedRoute
from app.api.deps import DatabaseSession
from app.api.problems import responses
from app.api.replay import not_modified
from app.errors import not_found
from app.headers import attachment, image_name
from app.services import images

router = APIRouter(prefix="/v1/images", tags=["images"], route_class=GuardedRoute)

_IMMUTABLE = "private, max-age=31536000, immutable"


@router.get(
    "/{image_id}/thumbnail",
    response_class=FileResponse,
    responses={200: {"content": {"image/jpeg": {}}}, **responses(404, 422)},
)
def get_thumbnail(image_id: uuid.UUID, request: Request, session: DatabaseSession) -> Response:
    """A small JPEG, encoded anew and without metadata."""
    image = images.get(session, image_id)
    answer = FileResponse(
        _there(image_id, storage.thumbnail(image.collection_id, image.sha256)), media_type="image/jpeg"
    )
    return not_modified(request, answer, image.sha256, caching=_IMMUTABLE) or answer


@router.get(
    "/{image_id}/original",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **responses(404, 422)},
)
def get_original(image_id: uuid.UUID, session: DatabaseSession) -> FileResponse:
    """The file as it was uploaded, to be saved, never shown: it may be anything inside."""
    image = images.get(session, image_id)
    return FileResponse(
        _there(image_id, storage.original(image.collection_id, image.sha256)),
        media_type="application/octet-stream",
        headers={
            "Cache-Control": _IMMUTABLE,
            "Content-Disposition": attachment(image_name(image.filename, image.format)),
        },
    )


def _there(image_id: uuid.UUID, path: Path) -> Path:
    """The file, unless its collection was deleted a moment ago."""
    if not path.is_file():
        raise not_found("image", image_id)
    return path
