"""`kindred keys`: makes, lists and revokes keys, on the service's own database."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.config import Settings
from app.db.migrate import upgrade
from app.db.session import session_of
from app.db.tables import ApiKey
from app.embedded import has_cluster, running_postgres
from app.errors import KindredError
from app.services import keys, tenants
from app.services.keys import Scope

keys_cli = typer.Typer(
    no_args_is_help=True, help="Makes, lists and revokes keys. Once there is one, requests need one."
)
console = Console()
messages = Console(stderr=True)


@keys_cli.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[Scope, typer.Option(help="read; write; admin, who makes and revokes keys.")] = "write",
    tenant: Annotated[
        str, typer.Option(help="Whose it is. Tenants see nothing of each other; a new name makes a new one.")
    ] = tenants.DEFAULT_NAME,
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days until it expires; unset: never.")] = None,
) -> None:
    """Make a key and print it, this once."""
    if not 1 <= len(name.strip()) <= 100 or not name.isprintable():
        raise typer.BadParameter("a key's name must have 1 to 100 printable characters")
    lasts = None if days is None else timedelta(days=days)
    with _database() as session:
        first = not keys.exist(session)
        whose = tenants.named(session, tenant)
        _, key = keys.create(session, name.strip(), scope, lasts=lasts, tenant_id=whose.id)
        session.commit()
    messages.print(f"The {scope} key {escape(name)} of the tenant {escape(tenant)}. It is shown this once:")
    console.print(key, soft_wrap=True, highlight=False)
    if first:
        settings = Settings()
        where = "" if settings.database_url else f" to the service on {escape(str(_place(settings)))}"
        messages.print(
            f"It is the first, so from now on every request{where} needs a key: the dashboard asks for it, and "
            "`kindred cluster` sends what KINDRED_API_KEY holds.",
            soft_wrap=True,
        )


@keys_cli.command("list")
def list_keys() -> None:
    """List the keys of all tenants, oldest first."""
    table = Table()
    for heading in ("key", "name", "tenant", "scope", "state", "last used"):
        table.add_column(heading, no_wrap=heading == "key")
    with _database(made=True) as session:
        for tenant, row in keys.list_all(session):
            table.add_row(
                row.prefix,
                escape(row.name),
                escape(tenant),
                row.scope,
                _state(row),
                f"{row.last_used_at:%Y-%m-%d %H:%M}" if row.last_used_at else "never",
            )
    console.print(table)


@keys_cli.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="How it begins: `kindred_` and 16 characters, or those.")],
) -> None:
    """End a key, and every sign-in that was made with it."""
    with _database(made=True) as session:
        row = keys.revoke(session, keys.by_prefix(session, key).id)
        session.commit()
        console.print(f"kindred_{row.prefix}_… ({escape(row.name)}) opens nothing any more.", soft_wrap=True)


@contextmanager
def _database(*, made: bool = False) -> Iterator[Session]:
    """The database that the service uses with these settings: one of its own, or the embedded one, running or not.

    With `made` it has to be there already.
    """
    settings = Settings()
    if made and settings.database_url is None and not has_cluster(settings.data_dir):
        raise KindredError(
            f"there is no database in {_place(settings)}; start the command where the service was started, or name its "
            "data folder by KINDRED_DATA_DIR"
        )
    try:
        if settings.database_url is not None:
            with session_of(settings.database_url) as session:
                yield session
            return
        with running_postgres(settings.data_dir) as url:
            upgrade(url)
            with session_of(url) as session:
                yield session
    except DBAPIError as error:
        why = " ".join(str(error.orig).split())
        if "does not exist" in why:
            raise KindredError("the database has no keys yet: bring it up to date with `kindred migrate`") from error
        raise KindredError(f"the database cannot be used: {why}") from error


def _place(settings: Settings) -> Path:
    return settings.data_dir.expanduser().resolve()


def _state(row: ApiKey) -> str:
    if row.revoked_at is not None:
        return "revoked"
    if row.expires_at is None:
        return "good"
    return "expired" if row.expires_at < datetime.now(UTC) else f"until {row.expires_at:%Y-%m-%d}"
