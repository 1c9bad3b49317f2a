"""Looking into embedded servers from outside."""

import re
from contextlib import suppress
from pathlib import Path

import redis
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from app.embedded import ServerUrls


def execute(urls: ServerUrls, statement: str) -> list[tuple]:
    engine = create_engine(urls.database_url, poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def socket_of(urls: ServerUrls) -> tuple[str, str]:
    """Path and password of Valkey's socket."""
    password, path = re.fullmatch(r"redis\+socket://:([^@]+)@(/.+)", urls.broker_url).groups()
    return path, password


def valkey(urls: ServerUrls) -> redis.Redis:
    path, password = socket_of(urls)
    return redis.Redis(unix_socket_path=path, password=password, decode_responses=True)


def servers_of(data_dir: Path) -> list[int]:
    """Processes that carry the data folder's inode in their titles."""
    inode = f"-{data_dir.stat().st_ino:016x}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if inode in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def answers(urls: ServerUrls) -> bool:
    try:
        return execute(urls, "SELECT 1") == [(1,)]
    except OperationalError:
        return False
