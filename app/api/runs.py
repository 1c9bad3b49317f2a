import asyncio
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app import queue
from app.access import GuardedRoute, authenticate, caller_of
from app.api.deps import Cursor, DatabaseSession, IdempotencyKeyHeader, Limit
from app.api.problems import responses
from app.api.replay import digest
from app.api.schemas import PageOf, RunOut
from app.db.session import tenant_of, tenant_session
from app.db.tables import TERMINAL_STATES
from app.errors import Unauthenticated
from app.services import idempotency, runs
from app.services.parameters import Parameters

router = APIRouter(prefix="/v1", tags=["runs"], route_class=GuardedRoute)

_POLL_S = 0.5
_KEEP_ALIVE_POLLS = 30


@router.post("/collections/{collection_id}/runs", status_code=202, responses=responses(400, 404, 409, 413, 422))
def create_run(
    collection_id: uuid.UUID,
    parameters: Parameters,
    response: Response,
    session: DatabaseSession,
    key: IdempotencyKeyHeader = None,
) -> RunOut:
    """Start a run on the images that the collection has now. Poll `Location`."""
    request_digest = digest("POST", f"/v1/collections/{collection_id}/runs", parameters.model_dump_json())
    known = idempotency.recall(session, key, request_digest)
    if known is not None:
        answer = RunOut.model_validate(known.body)
    else:
        answer = RunOut.of(runs.create(session, collection_id, parameters))
        idempotency.remember(
            session,
            key,
            request_digest,
            status=202,
            location=answer.links["self"],
            body=answer.model_dump(mode="json"),
        )
        session.commit()
        queue.ring_run(answer.id)
    response.headers["Location"] = answer.links["self"]
    response.headers["Retry-After"] = "1"
    return answer


@router.post("/parameters", responses=responses(400, 413, 422))
def check_parameters(parameters: Parameters, session: DatabaseSession) -> Parameters:
    """What a run would be asked to do, without starting one: to hear before a long upload what is wrong with it."""
    runs.check(session, tenant_of(session), parameters)
    return parameters


@router.get("/collections/{collection_id}/runs", responses=responses(404, 422))
def list_runs(
    collection_id: uuid.UUID, session: DatabaseSession, limit: Limit = 50, cursor: Cursor = None
) -> PageOf[RunOut]:
    """The runs over a collection, newest first."""
    page = runs.list_page(session, collection_id, limit, cursor)
    return PageOf(items=[RunOut.of(row) for row in page.items], next=page.next)


@router.get("/runs/{run_id}", responses=responses(404, 422))
def get_run(run_id: uuid.UUID, response: Response, session: DatabaseSession) -> RunOut:
    """State, stage, progress, resolved parameters and, when done, metrics."""
    run = RunOut.of(runs.get(session, run_id))
    if run.state not in TERMINAL_STATES:
        response.headers["Retry-After"] = "1"
    return run


@router.post("/runs/{run_id}/cancel", status_code=202, responses=responses(404, 409, 422))
def cancel_run(run_id: uuid.UUID, response: Response, session: DatabaseSession) -> RunOut:
    """Ask a run to stop. A queued one has stopped with the answer; a running one within seconds."""
    run = RunOut.of(runs.cancel(session, run_id))
    session.commit()
    response.headers["Location"] = run.links["self"]
    return run


@router.get(
    "/runs/{run_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **responses(404, 422)},
)
def stream_events(run_id: uuid.UUID, request: Request, session: DatabaseSession) -> StreamingResponse:
    """Server-sent events: `progress` with the run whenever it changes, `end` with the finished run."""
    runs.get(session, run_id)
    return StreamingResponse(
        _events(run_id, tenant_of(session), request),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _may_stay(request: Request) -> bool:
    """Whether whoever listens would still be let in: a key may be revoked meanwhile."""
    try:
        return authenticate(request).tenant_id == caller_of(request).tenant_id
    except Unauthenticated:
        return False


async def _events(run_id: uuid.UUID, tenant_id: uuid.UUID, request: Request) -> AsyncIterator[str]:
    def read() -> RunOut:
        with tenant_session(tenant_id) as session:
            return RunOut.of(runs.get(session, run_id))

    last, quiet, polls = "", 0, 0
    while not await request.is_disconnected():
        run = await run_in_threadpool(read)
        data = run.model_dump_json()
        over = run.state in TERMINAL_STATES
        if data != last or over:
            yield f"event: {'end' if over else 'progress'}\ndata: {data}\n\n"
            last, quiet = data, 0
        if over:
            return
        quiet, polls = quiet + 1, polls + 1
        if polls % _KEEP_ALIVE_POLLS == 0 and not await run_in_threadpool(_may_stay, request):
            return
        if quiet >= _KEEP_ALIVE_POLLS:
            yield ": still here\n\n"
            quiet = 0
        await asyncio.sleep(_POLL_S)
