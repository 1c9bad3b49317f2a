"""The whole service as real processes, each of which a test may kill, freeze, stop and start again."""

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

from app.db.migrate import upgrade
from app.embedded import Server, postgres_server, valkey_server
from app.processes import Identity, launch_command
from tests import checkpoints
from tests.trainings import WHOLE_NETWORK
from tests.waiting import wait_for

# Short, so that a fault costs seconds; `REAL` are the defaults, for promises that name seconds.
QUICK = {
    "KINDRED_LEASE_S": "6", "KINDRED_HEARTBEAT_S": "1", "KINDRED_SWEEP_S": "1", "KINDRED_CHECKPOINT_S": "0.5",
}  # fmt: skip
REAL = dict.fromkeys(QUICK, "")
WHOLE = WHOLE_NETWORK | {"epochs": 200, "seed": 3}
CELERY = (
    *(sys.executable, "-m", "celery", "--quiet", "-A", "worker.celery_app", "worker", "--loglevel", "INFO"),
    *("--without-gossip", "--without-mingle", "-P", "threads", "-c", "1"),
)


def is_past(row: dict[str, Any], attempt: int) -> bool:
    """Whether the job is over, or in an attempt after this one."""
    return row["attempt"] > attempt or row["state"] not in ("queued", "running")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A program that a test may harm."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        log: Path,
        *,
        cwd: Path,
        identity: Identity | None = None,
    ) -> None:
        self._command, self._environment, self.log = command, environment, log
        self._cwd, self._identity = cwd, identity
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                launch_command(self._command, self._identity),
                env=self._environment,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a deadly signal and see it off."""
        if self.running:
            self.send(number)
        self.wait()

    def trainers(self) -> list[psutil.Process]:
        """The trainers that this worker has started."""
        with suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(self.pid).children() if is_trainer(child)]
        return []

    def said(self, text: str) -> int:
        """How often its log holds a text."""
        return self.log.read_text(errors="replace").count(text)


def wait_until_ready(worker: Process, tries: int) -> None:
    for left in reversed(range(tries)):
        wait_for(lambda: worker.said(" ready.") or not worker.running)
        if worker.running:
            return
        assert left, f"the worker ended with {worker.wait()} before it was ready: {worker.log.read_text()}"
        worker.start()


def is_trainer(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.status() != psutil.STATUS_ZOMBIE and "worker.trainer" in process.cmdline()
    return False


class Stack:
    """PostgreSQL, Valkey and the API, and as many workers as a test wants; files under `files`."""

    def __init__(self, root: Path, files: Path) -> None:
        self.root, self.files = root, files
        self._postgres, self._valkey = postgres_server(root), valkey_server(root)
        self.postgres, self.valkey = self._process(self._postgres), self._process(self._valkey)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        listen = ["--host", "127.0.0.1", "--port", str(self.port), "--timeout-graceful-shutdown", "2"]
        self.api = Process(
            [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", *listen],
            self.environment(),
            root / "api.log",
            cwd=root,
        )
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._workers = 0

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KINDRED_")}
        ours = QUICK | {
            "KINDRED_DATABASE_URL": self._postgres.url,
            "KINDRED_BROKER_URL": self._valkey.url,
            "KINDRED_DATA_DIR": str(self.files),
            "KINDRED_INGEST_PROCESSES": "1",
            # Threads that wait for each other on busy cores take many times longer than one.
            "OMP_NUM_THREADS": "1",
            "LOKY_MAX_CPU_COUNT": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return clean | {name: value for name, value in (ours | more).items() if value}

    def _process(self, server: Server) -> Process:
        child = server.child
        log = self.root / f"{child.name}.log"
        return Process(list(child.command), dict(child.environment), log, cwd=child.cwd, identity=child.identity)

    def start_postgres(self) -> None:
        if self._postgres.child.before_start:
            self._postgres.child.before_start()
        self.postgres.start()
        wait_for(self._asks(self._postgres, psycopg.OperationalError), every_s=0.02)

    def stop_postgres(self) -> None:
        """In immediate mode: no checkpoint, no goodbye; the next start recovers from the log."""
        self.postgres.kill(signal.SIGQUIT)

    def start_valkey(self) -> None:
        self.valkey.start()
        wait_for(self._asks(self._valkey, redis.RedisError), every_s=0.02)

    def forget_messages(self, *, append_only: bool) -> None:
        """Whether Valkey writes down what it is told; to be called while it is down."""
        conf = self.root / "valkey" / "valkey.conf"
        words = {True: "appendonly yes", False: "appendonly no"}
        conf.write_text(conf.read_text().replace(words[not append_only], words[append_only]))

    @staticmethod
    def _asks(server: Server, away: type[Exception]) -> Callable[[], bool]:
        def answers() -> bool:
            try:
                server.ask()
            except away:
                return False
            return True

        return answers

    def broker(self) -> redis.Redis:
        password, socket = self._valkey.url.removeprefix("redis+socket://:").split("@")
        return redis.Redis(unix_socket_path=socket, password=password)

    def start_api(self) -> None:
        self.api.start()
        wait_for(self.answers, every_s=0.02)

    def answers(self) -> bool:
        assert self.api.running, self.api.log.read_text()[-2000:]
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def start(self) -> None:
        self.start_postgres()
        self.start_valkey()
        upgrade(self._postgres.url)
        self.start_api()

    def stop(self) -> None:
        self.http.close()
        for process in (self.api, self.valkey):
            if process.running:
                process.kill()
        if self.postgres.running:
            self.postgres.kill(signal.SIGQUIT)

    @contextmanager
    def workers(
        self, *queues: str, before: tuple[str, ...] = (), tries: int = 1, **more: str
    ) -> Iterator[list[Process]]:
        """Real Celery workers, one for each queue named, ready; killed at the end.

        One that ends before it is ready is started again until `tries` are used up.
        """
        found = []
        for queue in queues:
            self._workers += 1
            name = f"{queue}{self._workers}"
            found.append(
                Process(
                    [*before, *CELERY, "-Q", queue, "-n", f"{name}@%h"],
                    self.environment(**more),
                    self.root / f"{name}.log",
                    cwd=self.root,
                )
            )
        try:
            for process in found:
                process.start()
            for process in found:
                wait_until_ready(process, tries)
            yield found
        finally:
            for process in found:
                if process.running:
                    process.send(signal.SIGCONT)
                    process.kill()
            wait_for(lambda: not self.trainers(), timeout_s=10)

    def restart(self, worker: Process) -> None:
        ready = worker.said(" ready.")
        worker.start()
        wait_for(lambda: worker.said(" ready.") > ready)

    def trainers(self) -> list[psutil.Process]:
        """Every trainer of this stack, whoever started it."""
        return [
            process
            for process in psutil.process_iter()
            if is_trainer(process) and any(str(self.files) in word for word in process.cmdline())
        ]

    # -- what a user does --

    def upload(self, content: bytes, collection: str | None = None, name: str = "a.zip") -> dict[str, Any]:
        """Send an archive; the upload as it was answered."""
        if collection is None:
            collection = self.http.post("/v1/collections", json={"name": "faults"}).raise_for_status().json()["id"]
        answer = self.http.post(f"/v1/collections/{collection}/uploads", files={"file": (name, content)})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def submit(self, collection: str, **parameters: object) -> str:
        answer = self.http.post(f"/v1/collections/{collection}/runs", json={"clusters": 2, **parameters})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, path: str) -> dict[str, Any]:
        return dict(self.http.get(path).raise_for_status().json())

    def run(self, run_id: str) -> dict[str, Any]:
        return self.get(f"/v1/runs/{run_id}")

    def ended(self, path: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """An upload or run once it is over."""
        over = ("succeeded", "failed", "cancelled")
        return dict(wait_for(lambda: (found := self.get(path))["state"] in over and found, timeout_s))

    def labels(self, run_id: str) -> str:
        return self.http.get(f"/v1/runs/{run_id}/labels.csv").raise_for_status().text

    def row(self, run_id: str, table: str = "runs") -> dict[str, Any]:
        """The row as PostgreSQL has it."""
        return self.rows(f"SELECT * FROM {table} WHERE id = %s", run_id)[0]

    def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
        place = dict(part.split("=") for part in self._postgres.url.split("?")[1].split("&"))
        host = place["host"].replace("%2F", "/")
        with psycopg.connect(
            host=host, port=place["port"], user="kindred", dbname="kindred", row_factory=psycopg.rows.dict_row
        ) as connection:
            cursor = connection.execute(statement, values)  # type: ignore[arg-type]  # it asks for literals
            return cursor.fetchall() if cursor.description else []

    def folder(self, run_id: str) -> Path:
        return self.files / "runs" / str(uuid.UUID(run_id))

    def steps_done(self, run_id: str) -> int:
        return checkpoints.steps_done(self.folder(run_id) / "checkpoint")
