"""Servers that a killed predecessor left, found by the mark on their command lines, and their end."""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from app.processes import StartError

_TIMEOUT_S = 20.0


def end_leftovers(program: str, mark: str, gently: signal.Signals, leaders: set[int] | None = None) -> None:
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


def program_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def _send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _await_none(program: str, mark: str) -> list[int]:
    deadline = time.monotonic() + _TIMEOUT_S
    while (left := _marked(program, mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _marked(program: str, mark: str) -> list[int]:
    """Running programs with our mark on their command line, which any user can read, unlike their folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            if program_of(pid) == program and mark.encode() in (folder / "cmdline").read_bytes():
                found.append(pid)
    return found
