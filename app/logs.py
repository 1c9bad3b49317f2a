"""Structured logs, a line an event, for the API and the workers alike."""

import logging

import structlog


def configure_logs(level: int | str = "INFO") -> None:
    """Send the standard library's records and structlog's events to standard error in one form."""
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"], drop_missing=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
