import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from app import storage
from app.access import GuardedRoute
from app.api.deps import DatabaseSession
from app.api.download import CSV, Bom, download
from app.api.problems import responses
from app.api.replay import not_modified
from app.errors import NotFound
from app.services import results, runs

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["labels"], route_class=GuardedRoute)

_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has this version."}}


@router.get(
    "/labels.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}}, **_NOT_MODIFIED, **responses(404, 409, 422, 507)},
)
def get_labels_csv(
    run_id: uuid.UUID, request: Request, response: Response, session: DatabaseSession, *, bom: Bom = False
) -> Response:
    """Every image's label, a row each."""
    runs.get_succeeded(session, run_id)
    return not_modified(request, response, f"{run_id}-csv{'-bom' if bom else ''}") or download(
        results.labels_csv(session, run_id), f"labels-{run_id}.csv", CSV, _kept(response), bom=bom
    )


@router.get(
    "/labels.json",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/json": {}}}, **_NOT_MODIFIED, **responses(404, 409, 422, 507)},
)
def get_labels_json(run_id: uuid.UUID, request: Request, response: Response, session: DatabaseSession) -> Response:
    """Every image's label, an object each."""
    runs.get_succeeded(session, run_id)
    return not_modified(request, response, f"{run_id}-json") or download(
        results.labels_json(session, run_id),
        f"labels-{run_id}.json",
        "application/json",
        _kept(response),
    )


@router.get(
    "/levels.csv",
    response_class=FileResponse,
    responses={200: {"content": {"text/csv": {}}}, **_NOT_MODIFIED, **responses(404, 409, 422)},
)
def get_levels_csv(run_id: uuid.UUID, request: Request, response: Response, session: DatabaseSession) -> Response:
    """Every image's group at each level of the merge tree: a column `groups_N` for the collection read as N groups."""
    runs.get_succeeded(session, run_id)
    path = storage.levels(run_id)
    if not path.is_file():
        raise NotFound(f"Run {run_id} has no merge tree.", code="levels-not-found")
    return not_modified(request, response, f"{run_id}-levels") or FileResponse(
        path,
        media_type="text/csv; charset=utf-8",
        filename=f"levels-{run_id}.csv",
        headers=_kept(response),
    )


def _kept(response: Response) -> dict[str, str]:
    """What `not_modified` has set, for an answer that FastAPI does not make."""
    return {"ETag": response.headers["etag"], "Cache-Control": response.headers["cache-control"]}
