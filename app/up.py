"""The whole service on this machine: servers, API and workers as children of one process."""

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import httpx
from sqlalchemy.exc import OperationalError

from app.config import Settings
from app.data_folder import OwnedFolder, owned_folder, owner
from app.db.migrate import upgrade
from app.db.session import session_of
from app.embedded import ServerUrls, has_cluster, postgres_server, sockets_removed, start_servers, valkey_server
from app.errors import KindredError
from app.hosts import is_loopback
from app.processes import Child, Output, StartError, Supervisor, signals_interrupt
from app.services import keys

__all__ = ["StartError", "running_service", "running_url", "up"]

_READY_TIMEOUT_S = 90.0
_API_GRACE_S = 5
_WORKER_GRACE_S = 30.0


def up(settings: Settings, *, ready: Callable[[str], None] | None = None, quiet: bool = False) -> int:
    """Run the service until Ctrl-C or SIGTERM; the exit status.

    `ready` gets the URL as soon as it answers. `quiet` sends what the processes say to `logs/kindred.log` in
    the data folder and prints errors only.
    """
    try:
        with signals_interrupt(), _service(settings, quiet=quiet) as (url, supervisor):
            if not quiet:
                _say(f"Kindred is ready: {url}", sys.stdout)
                _say(_who_may_enter(settings), sys.stdout)
            if ready:
                ready(url)
            try:
                supervisor.wait()
            except KeyboardInterrupt:
                if not quiet:
                    _say("Stopping; Ctrl-C again to hurry.", sys.stdout)
    except KeyboardInterrupt:  # while starting
        return 0
    except KindredError as error:
        _say(f"kindred: {error}", sys.stderr)
        return 1
    return 0


@contextmanager
def running_service(settings: Settings) -> Iterator[str]:
    """The service for as long as the context lasts, and its URL; it logs to `logs/kindred.log`."""
    with signals_interrupt(), _service(settings, quiet=True) as (url, _):
        yield url


def running_url(data_dir: Path) -> str | None:
    """The URL of the service that runs on a data folder and is ready, started by whomever."""
    found = owner(data_dir)
    return found.url if found and found.ready else None


@contextmanager
def _service(settings: Settings, *, quiet: bool) -> Iterator[tuple[str, Supervisor]]:
    url = _url(settings)
    if not is_loopback(settings.host) and settings.database_url is None and not has_cluster(settings.data_dir):
        raise _keyless(settings.host)  # before anything is made
    with ExitStack() as stack:
        folder = stack.enter_context(owned_folder(settings.data_dir))
        folder.announce(url=url)
        _check_port(settings.host, settings.port)
        log = folder.path / "logs" / "kindred.log"
        output = stack.enter_context(Output.to_file(log)) if quiet else Output(sys.stdout)
        stack.enter_context(sockets_removed(folder.path))
        supervisor = stack.enter_context(Supervisor(output))
        urls = _servers(settings, folder, supervisor)
        _migrate(urls.database_url)
        if not is_loopback(settings.host) and not _has_keys(urls.database_url):
            raise _keyless(settings.host)
        supervisor.start(*_children(settings, folder.path, urls))
        _await_ready(url, supervisor)
        folder.announce(url=url, ready=True)
        yield url, supervisor


def _say(text: str, stream: TextIO) -> None:
    with suppress(OSError):  # whoever read it may be gone
        stream.write(f"{text}\n")
        stream.flush()


def _url(settings: Settings) -> str:
    """Where this machine reaches the API."""
    host = settings.host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # every address of the machine, this one among them
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{settings.port}"


def _has_keys(database_url: str) -> bool:
    with session_of(database_url) as session:
        return keys.exist(session)


def _keyless(host: str) -> StartError:
    return StartError(
        f"{host} is not an address of this machine alone, and there is no key yet: make one with "
        "`kindred keys create NAME`, or leave KINDRED_HOST at 127.0.0.1"
    )


def _who_may_enter(settings: Settings) -> str:
    if not is_loopback(settings.host):
        return "Other machines reach it, over HTTP without encryption; every request needs a key."
    return "It answers this machine only. Until `kindred keys create NAME` makes a key, it asks for none."


def _check_port(host: str, port: int) -> None:
    """Say that the port is taken before anything is started, rather than by the API's death."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API will
            try:
                probe.bind(address)
            except PermissionError:
                problem = "is for root only"
            except OSError:
                problem = "is taken"
            else:
                continue
        raise StartError(
            f"port {port} on {host} {problem}; choose another with KINDRED_PORT, or, if a Kindred listens there, "
            "name it to the command by KINDRED_SERVER"
        )


def _servers(settings: Settings, folder: OwnedFolder, supervisor: Supervisor) -> ServerUrls:
    """The URLs of the servers to use; those that the settings do not name are started."""
    postgres = None if settings.database_url else postgres_server(folder.path)
    valkey = None if settings.broker_url else valkey_server(folder.path)
    start_servers(supervisor, [server for server in (postgres, valkey) if server])
    return ServerUrls(
        database_url=postgres.url if postgres else str(settings.database_url),
        broker_url=valkey.url if valkey else str(settings.broker_url),
    )


def _migrate(database_url: str) -> None:
    try:
        upgrade(database_url)
    except OperationalError as error:
        raise StartError(f"the database cannot be used: {' '.join(str(error.orig).split())}") from error


def _children(settings: Settings, data_dir: Path, urls: ServerUrls) -> list[Child]:
    python = [sys.executable, "-m"]
    listen = ["--host", settings.host, "--port", str(settings.port)]
    uvicorn = [*python, "uvicorn", "app.main:create_app", "--factory", *listen, "--no-server-header"]
    # Quiet: no banner. Workers need to know nothing of each other, and asking around costs each start a second.
    celery = [*python, "celery", "--quiet", "-A", "worker.celery_app", "worker", "--loglevel", "INFO"]
    alone = ["--without-gossip", "--without-mingle", "-P", "threads", "-c", "1"]
    environment = _environment(settings, urls)
    return [
        Child(
            name="api",
            command=[*uvicorn, "--timeout-graceful-shutdown", str(_API_GRACE_S)],
            environment=environment,
            cwd=data_dir,
            stop_timeout_s=_API_GRACE_S + 3.0,
        ),
        *(
            Child(
                name=queue,
                command=[*celery, *alone, "-Q", queue, "-n", f"{queue}@%h"],
                environment=environment,
                cwd=data_dir,
                stop_timeout_s=_WORKER_GRACE_S,
            )
            for queue in ("ingest", "train")
        ),
    ]


def _environment(settings: Settings, urls: ServerUrls) -> dict[str, str]:
    """Our environment, and every setting as we have it: the caller's need not come from the environment."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("KINDRED_")}
    values = settings.model_dump(exclude={"api_key"}) | {
        "database_url": urls.database_url,
        "broker_url": urls.broker_url,
    }
    ours = {
        # Children run in the data folder, so that nobody's `app` folder gets in the way.
        f"KINDRED_{name.upper()}": str(value.expanduser().resolve() if isinstance(value, Path) else value)
        for name, value in values.items()
        if value is not None
    }
    return given | ours | {"PYTHONUNBUFFERED": "1"}


def _await_ready(url: str, supervisor: Supervisor) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    answer = "no answer"
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:  # no proxy to ourselves
        while time.monotonic() < deadline:
            supervisor.check()
            try:
                status = client.get("/readyz").status_code
                if status == httpx.codes.OK:
                    return
                answer = f"status {status}"
            except httpx.TransportError as error:
                answer = type(error).__name__
            time.sleep(0.05)
    raise StartError(f"the service was not ready within {_READY_TIMEOUT_S:.0f} s ({url}/readyz: {answer})")
