"""Rows straight out of PostgreSQL's own COPY, at constant memory and under the session's role.

A million of them one by one cost more in Python than in the database, so they come some hundred at a time.
"""

from collections.abc import Generator, Mapping
from itertools import islice

import psycopg
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

_ROWS = 1000


def csv_blocks(session: Session, query: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    """The rows of a query as RFC 4180 text, their columns' names first, a line feed at each end."""
    return _blocks(session, f"COPY ({query}) TO STDOUT (FORMAT csv, HEADER)", parameters)


def json_blocks(session: Session, query: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    """The rows of a query as JSON objects, a line each."""
    # JSON has no control characters, so with these as quote and delimiter its text comes out as it is.
    raw = r"(FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"
    objects = f"SELECT row_to_json(rows) FROM ({query}) rows"  # noqa: S608 - a query of ours
    return _blocks(session, f"COPY ({objects}) TO STDOUT {raw}", parameters)


def _blocks(session: Session, statement: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    """Raises SQLAlchemy's `OperationalError` where the database goes away meanwhile, as a query would."""
    driver = session.connection().connection.driver_connection
    assert driver is not None  # noqa: S101 - a live session has one
    try:
        with driver.cursor() as cursor, cursor.copy(statement, parameters) as copy:
            rows = iter(copy)
            while block := b"".join(islice(rows, _ROWS)):
                yield block
    except psycopg.OperationalError as error:
        session.invalidate()
        raise OperationalError(statement, None, error) from error
