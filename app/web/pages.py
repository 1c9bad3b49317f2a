"""The dashboard's pages; they read by the same services as the API, and write through the API."""

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query
from fastapi.responses import HTMLResponse
from sqlalchemy.orm import Session

from app.access import Caller, GuardedRoute, caller_of
from app.db.session import tenant_session
from app.db.tables import Run, Upload
from app.errors import NotFound
from app.services import collections, images, results, runs, uploads
from app.services.pages import encode
from app.web import evidence, problem_pages, reference, render, sign_in
from app.web.guard import CrossSiteGuard

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse, route_class=GuardedRoute)

COLLECTIONS_A_PAGE = 20
JOBS_A_PAGE = 50
CLUSTERS_A_PAGE = 60
MEMBERS_A_PAGE = 96
LEDGER_A_PAGE = 200
_PREVIEWS = 5
_LATEST_RUNS = 4

CallerOf = Annotated[Caller, Depends(caller_of)]
Cursor = Annotated[str | None, Query(max_length=500)]
PageNumber = Annotated[int, Query(ge=1, le=1_000_000)]


def install(app: FastAPI) -> None:
    """Mount the pages and their static files. After the API, whose exception handlers it wraps."""
    app.include_router(router)
    app.include_router(sign_in.router)
    app.include_router(reference.router)
    app.mount("/static", render.Static(directory=render.HERE / "static"), name="static")
    app.add_middleware(CrossSiteGuard)
    problem_pages.install(app)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run, and the upload whose images it still waits for."""

    row: Run
    upload: Upload | None

    @property
    def open(self) -> bool:
        return self.row.state in collections.OPEN_STATES

    @property
    def state(self) -> str:
        """While its images are being taken in, a run is under way for whoever looks at it."""
        return self.upload.state if self.upload and self.upload.state == "running" else self.row.state


@dataclass(frozen=True, kw_only=True)
class Pager:
    """Where a list stands whose rows are numbered from 0 without gaps."""

    number: int
    last: int

    @classmethod
    def of(cls, number: int, total: int, size: int) -> "Pager":
        last = max(1, -(-total // size))
        if number > last:
            raise NotFound(f"This list ends with page {last}.", code="no-such-page")
        return cls(number=number, last=last)

    def cursor(self, size: int) -> str | None:
        return None if self.number == 1 else encode([(self.number - 1) * size - 1])


@router.get("/")
def home(caller: CallerOf, after: Cursor = None) -> HTMLResponse:
    with tenant_session(caller.tenant_id) as session:
        page = collections.list_page(session, COLLECTIONS_A_PAGE, after)
        ids = [view.id for view in page.items]
        latest = runs.latest(session, ids, each=_LATEST_RUNS)
        return render.page(
            "home.html",
            caller=caller,
            collections=page.items,
            next=page.next,
            first_page=after is None,
            runs={key: [_view(session, row) for row in rows] for key, rows in latest.items()},
            previews=images.sample(session, ids, each=_PREVIEWS),
        )


@router.get("/collections/{collection_id:uuid}")
def collection(
    caller: CallerOf, collection_id: uuid.UUID, after: Cursor = None, uploads_after: Cursor = None
) -> HTMLResponse:
    with tenant_session(caller.tenant_id) as session:
        view = collections.get(session, collection_id)
        page = runs.list_page(session, collection_id, JOBS_A_PAGE, after)
        received = uploads.list_page(session, collection_id, JOBS_A_PAGE, uploads_after)
        return render.page(
            "collection.html",
            caller=caller,
            collection=view,
            runs=[_view(session, row) for row in page.items],
            next_runs=page.next,
            first_runs=after is None,
            uploads=received.items,
            next_uploads=received.next,
            first_uploads=uploads_after is None,
            previews=images.sample(session, [collection_id], each=24)[collection_id],
        )


@router.get("/uploads/{upload_id:uuid}")
def upload_ledger(
    caller: CallerOf,
    upload_id: uuid.UUID,
    outcome: Literal["accepted", "duplicate", "rejected"] | None = None,
    after: Cursor = None,
) -> HTMLResponse:
    with tenant_session(caller.tenant_id) as session:
        upload = uploads.get(session, upload_id)
        page = uploads.ledger_page(session, upload_id, LEDGER_A_PAGE, after, outcome)
        return render.page(
            "ledger.html",
            caller=caller,
            upload=upload,
            collection=collections.get(session, upload.collection_id),
            outcome=outcome,
            rows=page.items,
            next=page.next,
            first_page=after is None,
        )


@router.get("/runs/{run_id:uuid}")
def run(caller: CallerOf, run_id: uuid.UUID, page: PageNumber = 1) -> HTMLResponse:
    with tenant_session(caller.tenant_id) as session:
        view = _view(session, runs.get(session, run_id))
        context: dict[str, Any] = {"run": view, "collection": collections.get(session, view.row.collection_id)}
        if view.row.state != "succeeded":
            return render.page("run.html", caller=caller, **context)
        sizes = results.sizes(session, run_id)
        pager = Pager.of(page, len(sizes), CLUSTERS_A_PAGE)
        found = results.clusters(session, run_id, CLUSTERS_A_PAGE, pager.cursor(CLUSTERS_A_PAGE))
        metrics = view.row.metrics or {}
        levels = evidence.levels(metrics)
        named = {number for level in levels for group in (*level.merged, level.parts) for number in group}
        return render.page(
            "result.html",
            caller=caller,
            **context,
            clusters=found.items,
            sizes=sizes,
            images=sum(sizes),
            pager=pager,
            metrics=metrics,
            sweep=evidence.sweep(metrics),
            comparison=evidence.comparison(metrics),
            levels=levels,
            names=results.names(session, run_id, named),
            faces=results.faces(session, run_id, named),
        )


@router.get("/runs/{run_id:uuid}/clusters/{number}")
def cluster(
    caller: CallerOf, run_id: uuid.UUID, number: Annotated[int, Path(ge=0, le=4095)], page: PageNumber = 1
) -> HTMLResponse:
    with tenant_session(caller.tenant_id) as session:
        row = runs.get_succeeded(session, run_id)
        view = results.cluster(session, run_id, number)
        pager = Pager.of(page, view.size, MEMBERS_A_PAGE)
        found = results.members(session, run_id, number, MEMBERS_A_PAGE, pager.cursor(MEMBERS_A_PAGE))
        doubted = {member.runner_up for member in found.items if not member.consensus}
        return render.page(
            "cluster.html",
            caller=caller,
            run=row,
            collection=collections.get(session, row.collection_id),
            cluster=view,
            members=found.items,
            names=results.names(session, run_id, {*doubted, number - 1, number + 1}),
            pager=pager,
        )


def _view(session: Session, row: Run) -> RunView:
    upload = uploads.get(session, row.upload_id) if row.state == "queued" and row.upload_id else None
    return RunView(row=row, upload=upload if upload and upload.state in collections.OPEN_STATES else None)
