from functools import lru_cache
from typing import Literal

import structlog
from alembic.script import ScriptDirectory
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app import metrics, queue, storage
from app.access import AdminRoute
from app.api.problems import problem, responses
from app.db.migrate import alembic_config
from app.db.session import open_session

log = structlog.get_logger(__name__)

router = APIRouter(tags=["health"])
guarded = APIRouter(tags=["health"], route_class=AdminRoute)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(Health):
    broker: Literal["ok", "away"] = Field(description="While it is away, work is taken in and waits: nothing is lost.")


@router.get("/healthz")
async def healthz() -> Health:
    """The process lives. Says nothing of what it needs, and waits for no thread."""
    return Health()


@router.get("/readyz", responses=responses(guarded=False), response_model=Readiness)
def readyz() -> Readiness | Response:
    """Requests can be served: the database answers and has this version's tables, the disk can be written to."""
    missing = dict((*_database(), *_disk()))
    if missing:
        log.warning("not_ready", **missing)
        errors = [{"field": name, "message": words} for name, words in missing.items()]
        detail = "Not ready: " + "; ".join(f"{name}: {words}" for name, words in missing.items()) + "."
        return problem(503, "not-ready", detail, errors=errors, headers={"Retry-After": "5"})
    return Readiness(broker="ok" if queue.answers() else "away")


@guarded.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **responses()},
)
def get_metrics() -> Response:
    """For Prometheus. Once there are keys it takes one of scope `admin`, as a bearer token."""
    return Response(metrics.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _database() -> list[tuple[str, str]]:
    try:
        with open_session() as session:
            found = session.scalar(text("SELECT version_num FROM alembic_version"))
    except SQLAlchemyError as error:
        return [("database", f"it does not answer ({type(error).__name__})")]
    if found != (wanted := _head()):
        return [("migrations", f"the tables are of version {found}, this code is of {wanted}: run kindred migrate")]
    return []


@lru_cache(maxsize=1)
def _head() -> str | None:
    return ScriptDirectory.from_config(alembic_config("postgresql://")).get_current_head()


def _disk() -> list[tuple[str, str]]:
    try:
        storage.try_to_write()
    except OSError as error:
        return [("disk", f"the data folder cannot be written to ({error.strerror})")]
    return []
