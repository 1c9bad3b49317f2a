"""Child processes: started, watched, started again when they die, and stopped in order."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self, TextIO

from app.errors import KindredError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_LONGEST_LINE = 16 * 1024
_LARGEST_LOG_BYTES = 10 * 1024 * 1024
_COLOURS = (36, 33, 32, 35, 34)
_MAX_DEATHS = 5
_DEATHS_WITHIN_S = 60.0
_HURRY_S = 2.0


class StartError(KindredError):
    """The service or a part of it cannot start, or cannot go on; `detail` says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whom a child runs as when not as ourselves, and the Linux capabilities that it keeps."""

    uid: int
    gid: int
    capabilities: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Child:
    """A program to keep running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    cwd: Path
    identity: Identity | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL
    """What the child gets when we are killed."""
    before_start: Callable[[], None] | None = None
    """Called before every start, restarts included; raises `StartError` when that is pointless."""

    def __post_init__(self) -> None:
        if not self.command or not Path(self.command[0]).is_absolute():
            raise ValueError(f"{self.name}: the command must begin with an absolute path, not {self.command}")
        if self.stop_timeout_s <= 0:
            raise ValueError(f"{self.name}: stop_timeout_s must be above 0, not {self.stop_timeout_s}")


class Output:
    """Lines of several processes on one stream, each whole and with the name of its process."""

    def __init__(self, stream: TextIO, *, path: Path | None = None) -> None:
        self.path = path
        self._stream = stream
        self._colour = stream.isatty() and "NO_COLOR" not in os.environ
        self._lock = threading.Lock()
        self._names: list[str] = []

    @classmethod
    @contextmanager
    def to_file(cls, path: Path) -> Iterator[Self]:
        """Append to `path`, readable by its owner only. A log above 10 MiB becomes `path.1` first."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LARGEST_LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as stream:
            yield cls(stream, path=path)

    def line(self, name: str, text: str) -> None:
        with self._lock:
            if name not in self._names:
                self._names.append(name)
            # Wide enough for the longest usual name, so that early lines stand under later ones.
            prefix = f"{name:<{max(8, *map(len, self._names))}} |"
            if self._colour:
                prefix = f"\x1b[{_COLOURS[self._names.index(name) % len(_COLOURS)]}m{prefix}\x1b[0m"
            # Whoever read our output may be gone; children go on, and so must reading from them.
            with suppress(OSError, ValueError):
                self._stream.write(f"{prefix} {text}\n")
                self._stream.flush()


class Supervisor:
    """Keeps children running until `stop`, which ends those started last first.

    Children started by one call are stopped together.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._groups: list[list[_Watch]] = []
        self._failure: str | None = None
        self._failed = threading.Event()
        self._hurry = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *children: Child) -> None:
        """Start children side by side; on return, each was started or given up."""
        group = [_Watch(child, self._output, self._give_up, self._hurry) for child in children]
        self._groups.append(group)
        for watch in group:
            watch.start()
        for watch in group:
            watch.begun.wait()

    def pids(self) -> dict[str, int]:
        """The processes that run right now."""
        watches = [watch for group in self._groups for watch in group]
        return {watch.child.name: pid for watch in watches if (pid := watch.pid()) is not None}

    def check(self) -> None:
        """Raise `StartError` when a child died so often that it was given up."""
        if self._failure is not None:
            raise StartError(self._failure)

    def wait(self) -> None:
        """Block until a child is given up, then raise `StartError`."""
        self._failed.wait()
        self.check()

    def stop(self) -> None:
        """Stop all children; a Ctrl-C or SIGTERM meanwhile leaves each at most two seconds."""
        with _on_stop_signals(lambda _number, _frame: self._hurry.set()):
            while self._groups:
                group = self._groups[-1]
                for watch in group:
                    watch.ask_to_stop()
                for watch in group:
                    watch.join()
                self._groups.pop()

    def _give_up(self, reason: str) -> None:
        where = f"; its output is in {self._output.path}" if self._output.path else ""
        self._failure = self._failure or reason + where
        self._failed.set()


class _Watch:
    """One child and the thread that starts and awaits it.

    The thread that starts a child must outlive it: the "parent" whose death Linux tells is that thread.
    """

    def __init__(self, child: Child, output: Output, give_up: Callable[[str], None], hurry: threading.Event) -> None:
        self.child = child
        self.begun = threading.Event()
        self._output = output
        self._give_up = give_up
        self._hurry = hurry
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # holds still the question whether there is a process
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch-{child.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def pid(self) -> int | None:
        with self._lock:
            return self._process.pid if self._process else None

    def ask_to_stop(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._process:
                os.kill(self._process.pid, self.child.stop_signal)

    def join(self) -> None:
        """Wait until the asked child has ended; kill it when its time is over."""
        asked = time.monotonic()
        hurried: float | None = None
        while self._thread.is_alive():
            self._thread.join(0.05)
            now = time.monotonic()
            if hurried is None and self._hurry.is_set():
                hurried = now
            late = now - asked > self.child.stop_timeout_s
            if late or (hurried is not None and now - hurried > _HURRY_S):
                self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _run(self) -> None:
        try:
            self._keep_running()
        finally:
            self.begun.set()

    def _keep_running(self) -> None:
        deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        while True:
            try:
                process = self._spawn()
            except (OSError, KindredError) as error:
                self._fail(f"{self.child.name} cannot be started: {error}")
                return
            if process is None:
                return
            self.begun.set()
            status = self._outcome(process)
            if self._stopping.is_set():
                return
            deaths.append(time.monotonic())
            if len(deaths) == _MAX_DEATHS and deaths[-1] - deaths[0] < _DEATHS_WITHIN_S:
                self._fail(
                    f"{self.child.name} died {_MAX_DEATHS} times within {_DEATHS_WITHIN_S:.0f} s "
                    f"(last: {status}) and is given up"
                )
                return
            recent = sum(deaths[-1] - death < _DEATHS_WITHIN_S for death in deaths)
            delay_s = 0.1 * 2 ** (recent - 1)
            self._output.line(self.child.name, f"{status}; starting it again in {delay_s:.1f} s")
            if self._stopping.wait(delay_s):
                return

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start the child; None when it is no longer wanted."""
        if self.child.before_start and not self._stopping.is_set():
            self.child.before_start()
        with self._lock:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(  # its output is closed by the thread that reads it
                launch_command(self.child.command, self.child.identity, self.child.death_signal),
                env=dict(self.child.environment),
                cwd=self.child.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we stop the children in order
            )
            process = self._process
        # A thread of its own: grandchildren may hold the pipe open long after the child's death.
        self._reader = threading.Thread(
            target=self._read, args=(process.stdout,), name=f"read-{self.child.name}", daemon=True
        )
        self._reader.start()
        return process

    def _outcome(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end of the child, end what is left of its group, and say how it ended."""
        if hasattr(os, "waitid"):
            # Not reaped yet: its number must not go to a stranger before we are done with the group.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        with self._lock:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            self._process = None
        self._reader.join(0.2)  # for the last lines, unless a grandchild holds the pipe
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(_LONGEST_LINE):
                self._output.line(self.child.name, line.decode(errors="replace").rstrip("\r\n"))

    def _fail(self, reason: str) -> None:
        self._output.line(self.child.name, reason)
        self._give_up(reason)


def launch_command(
    command: Sequence[str], identity: Identity | None, death_signal: signal.Signals = signal.SIGKILL
) -> list[str]:
    """The command line that runs `command` as `identity` and ends it when the calling thread dies."""
    order = {
        "parent": os.getpid(),
        "death_signal": int(death_signal),
        "uid": identity.uid if identity else None,
        "gid": identity.gid if identity else None,
        "capabilities": identity.capabilities if identity else (),
    }
    return [sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(order), *command]


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `KeyboardInterrupt` as Ctrl-C does, so that everything is unwound.

    Only the first signal does: another one must not interrupt the unwinding.
    """
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    with _on_stop_signals(interrupt):
        yield


@contextmanager
def _on_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
