from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from app.api.deps import SystemSession
from app.api.problems import responses

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/healthz")
def healthz() -> Health:
    """The process lives. Says nothing of what it needs."""
    return Health()


@router.get("/readyz", responses=responses(guarded=False))
def readyz(session: SystemSession) -> Health:
    """The database answers, so that requests can be served. The broker may be away: nothing is lost then."""
    session.execute(text("SELECT 1 FROM alembic_version"))
    return Health()
