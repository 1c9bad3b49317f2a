"""Structured logs, a line an event, for the API and the workers alike.

A line carries the ids of what it is about: `request` (which the answer names in `X-Request-ID`), `run` or `upload`,
and `attempt`. Values of settings, keys and the contents of files are never among them.
"""

import logging
import re
from collections.abc import MutableMapping
from typing import Any

import structlog

from app.config import settings

# PostgreSQL quotes the row that it refuses, which may hold names of files; what follows is SQLAlchemy's or Python's.
_ROW = re.compile(
    r"(?ms)^(DETAIL|CONTEXT):.*?(?=^\[SQL: |^\(Background on |^Traceback |^The above exception |^During |\Z)"
)


def _without_rows(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if "exception" in event:
        event["exception"] = _ROW.sub("(the row is not logged)\n", event["exception"])
    return event


def configure_logs(level: int | str = "INFO") -> None:
    """Give the standard library's records and structlog's events one form: `KINDRED_LOG_FORMAT`."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _without_rows,
    ]
    render: Any = structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"], drop_missing=True)
    if settings().log_format == "json":
        render = structlog.processors.JSONRenderer()
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # The API tells of each request itself, with its id and without the query.
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
