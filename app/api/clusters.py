import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from app.access import GuardedRoute
from app.api.deps import Cursor, DatabaseSession, Limit
from app.api.problems import responses
from app.api.replay import not_modified
from app.api.schemas import ClusterOut, MemberOut, PageOf, ReportOut
from app.services import results, runs

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["clusters"], route_class=GuardedRoute)

ClusterNumber = Annotated[int, Path(ge=0, le=4095, description="0 is the largest cluster.")]
_RESULT: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has this version."},
    **responses(404, 409, 422),
}


@router.get("/clusters", responses=_RESULT, response_model=PageOf[ClusterOut])
def list_clusters(
    run_id: uuid.UUID,
    request: Request,
    response: Response,
    session: DatabaseSession,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Any:
    """The clusters of a run, largest first, each with its representatives."""
    runs.get_succeeded(session, run_id)
    page = results.clusters(session, run_id, limit, cursor)
    return not_modified(request, response, f"{run_id}-clusters-{limit}-{cursor or ''}") or PageOf(
        items=[ClusterOut.of(run_id, view) for view in page.items], next=page.next
    )


@router.get("/clusters/{cluster}", responses=_RESULT, response_model=ClusterOut)
def get_cluster(
    run_id: uuid.UUID, cluster: ClusterNumber, request: Request, response: Response, session: DatabaseSession
) -> Any:
    runs.get_succeeded(session, run_id)
    view = ClusterOut.of(run_id, results.cluster(session, run_id, cluster))
    return not_modified(request, response, f"{run_id}-{cluster}") or view


@router.get("/clusters/{cluster}/images", responses=_RESULT, response_model=PageOf[MemberOut])
def list_cluster_images(
    run_id: uuid.UUID,
    cluster: ClusterNumber,
    request: Request,
    response: Response,
    session: DatabaseSession,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Any:
    """The members of a cluster, most typical first."""
    runs.get_succeeded(session, run_id)
    page = results.members(session, run_id, cluster, limit, cursor)
    return not_modified(request, response, f"{run_id}-{cluster}-{limit}-{cursor or ''}") or PageOf(
        items=[MemberOut.of(member) for member in page.items], next=page.next
    )


@router.get("/report", responses=_RESULT, response_model=ReportOut)
def get_report(run_id: uuid.UUID, request: Request, response: Response, session: DatabaseSession) -> Any:
    """Sizes and metrics: the evidence for how far the grouping can be trusted."""
    run = runs.get_succeeded(session, run_id)
    sizes = results.sizes(session, run_id)
    report = ReportOut(
        run_id=run.id,
        clusters=len(sizes),
        parameters=run.parameters,
        provenance=run.provenance,
        metrics=run.metrics or {},
        sizes=sizes,
    )
    return not_modified(request, response, f"{run_id}-report") or report
