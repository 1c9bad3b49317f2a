"""A data folder belongs to one process at a time, which says what it serves."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from app.processes import StartError


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that owns a data folder; `url` where it serves one, `ready` once that answers."""

    pid: int
    url: str | None = None
    ready: bool = False


@dataclass(frozen=True)
class OwnedFolder:
    """A data folder that is ours for the time being."""

    path: Path
    _lock: IO[str] = field(repr=False)

    def announce(self, *, url: str | None = None, ready: bool = False) -> None:
        """Tell other processes what we do here."""
        self._write(json.dumps({"pid": os.getpid(), "url": url, "ready": ready}))

    def _write(self, text: str) -> None:
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(text)
        self._lock.flush()


@contextmanager
def owned_folder(path: Path) -> Iterator[OwnedFolder]:
    """Own a data folder, which is created where missing. `StartError` names the owner if there is one."""
    path = path.expanduser().resolve()
    try:
        # As root, PostgreSQL runs as another user, who must pass through; nobody else may look.
        path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        lock = os.fdopen(os.open(_lock_file(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    except OSError as error:
        raise StartError(
            f"the data folder {path} cannot be used ({error.strerror}); choose another with KINDRED_DATA_DIR"
        ) from error
    with lock:
        first_user = os.fstat(lock.fileno()).st_uid
        if os.geteuid() == 0 != first_user:  # root would leave files behind that the user cannot use
            raise StartError(
                f"the data folder {path} belongs to user {first_user}: start Kindred as that user, "
                "or choose another folder with KINDRED_DATA_DIR"
            )
        if not _locked(lock):
            other = owner(path)
            who = f"process {other.pid}" if other else "another process"
            serves = f", which serves {other.url}" if other and other.url else ""
            raise StartError(f"the data folder {path} is in use by {who}{serves}")
        folder = OwnedFolder(path, lock)
        folder.announce()
        try:
            yield folder
        finally:
            folder._write("")  # noqa: SLF001 - the two are one thing


def owner(path: Path) -> Owner | None:
    """Who owns the data folder right now, if anybody does."""
    try:
        with _lock_file(path.expanduser().resolve()).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                said = json.loads(lock.read())
                return Owner(pid=said["pid"], url=said["url"], ready=said["ready"])
    except (OSError, ValueError):  # no such file, or an owner that comes or goes this very moment
        return None
    return None


def _lock_file(path: Path) -> Path:
    return path / "kindred.lock"


def _locked(lock: IO[str]) -> bool:
    for _ in range(5):  # `owner` holds a shared lock for an instant
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False
