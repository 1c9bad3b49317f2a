"""Rows into PostgreSQL and out of it by its own COPY, at constant memory and in the session's transaction and role."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import psycopg
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

# One by one, rows would cost more in Python than in the database.
_ROWS_IN_A_BLOCK = 1000


def insert_rows(session: Session, statement: str, rows: Iterable[Sequence[object]]) -> None:
    """Feed `COPY … FROM STDIN`. Raises `OperationalError` where the database goes away meanwhile, as a query would."""
    with _copying(session, statement) as copy:
        for row in rows:
            copy.write_row(row)


def csv_blocks(session: Session, query: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    """The rows of a query as RFC 4180 text, their columns' names first, a line feed at each end.

    Raises `OperationalError` as `insert_rows` does.
    """
    return _blocks(session, f"COPY ({query}) TO STDOUT (FORMAT csv, HEADER)", parameters)


def json_blocks(session: Session, query: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    """The rows of a query as JSON objects, a line each. Raises `OperationalError` as `insert_rows` does."""
    # JSON has no control characters, so with these as quote and delimiter its text comes out as it is.
    raw = r"(FORMAT csv, QUOTE E'\x01', DELIMITER E'\x02')"
    objects = f"SELECT row_to_json(rows) FROM ({query}) rows"  # noqa: S608 - a query of ours
    return _blocks(session, f"COPY ({objects}) TO STDOUT {raw}", parameters)


def _blocks(session: Session, statement: str, parameters: Mapping[str, object]) -> Generator[bytes]:
    with _copying(session, statement, parameters) as copy:
        rows = iter(copy)
        while block := b"".join(islice(rows, _ROWS_IN_A_BLOCK)):
            yield block


@contextmanager
def _copying(
    session: Session, statement: str, parameters: Mapping[str, object] | None = None
) -> Generator[psycopg.Copy]:
    driver = session.connection().connection.driver_connection
    assert driver is not None  # noqa: S101 - a live session has one
    try:
        with driver.cursor() as cursor, cursor.copy(statement, parameters) as copy:
            yield copy
    except psycopg.OperationalError as error:
        session.invalidate()
        raise OperationalError(statement, None, error) from error
