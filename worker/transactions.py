"""Changes that must reach the database, however long that is away."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.db.session import open_session

log = structlog.get_logger(__name__)
T = TypeVar("T")

_RETRY_S = 1.0
# How long a worker that is told to stop still waits; who is left unanswered is found by the sweeper.
_STOPPING_S = 5.0


def is_away(error: Exception) -> bool:
    """Whether the database could not be reached, as opposed to what was asked of it being wrong."""
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


def settle(change: Callable[[Session], T], stop: threading.Event) -> T:
    """Commit a change, and try again for as long as the database is away; what the change returned.

    The change may run again after a commit whose answer was lost, so it must be a conditional UPDATE that then finds
    nothing left to do.
    """
    stopping_since: float | None = None
    while True:
        try:
            with open_session() as session:
                found = change(session)
                session.commit()
        except Exception as error:
            if not is_away(error):
                raise
            now = time.monotonic()
            if stop.is_set():
                stopping_since = stopping_since or now
                if now - stopping_since > _STOPPING_S:
                    raise
            log.warning("database_away", error=type(error).__name__)
            time.sleep(_RETRY_S)
        else:
            return found
