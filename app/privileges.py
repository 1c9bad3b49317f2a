"""PostgreSQL refuses to run as root: how root runs it as somebody else, who reaches its files all the same."""

import os
import pwd
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.processes import Identity, StartError

# linux/capability.h
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_CAP_SETPCAP = 8


def identity_of(user: pwd.struct_passwd, paths: Sequence[Path]) -> Identity | None:
    """How to run a program as a user who must reach all `paths`; None where that is who we are.

    A clone under a home that is closed to others stays closed: rather than opening folders, the program
    keeps the one capability that lets it pass. `StartError` where that cannot be.
    """
    if os.geteuid() != 0:
        return None
    blocked = [part for path in paths for part in _blocked(path, user)]
    if not blocked:
        return Identity(uid=user.pw_uid, gid=user.pw_gid)
    held = _capabilities()
    # Enough to pass closed folders, but not to execute a file that only root may execute.
    wanted = [_CAP_DAC_OVERRIDE] if any(map(Path.is_file, blocked)) else [_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE]
    usable = [capability for capability in wanted if {capability, _CAP_SETPCAP} <= held]
    if not usable:
        raise StartError(
            f"PostgreSQL does not run as root but as {user.pw_name}, who may not enter {blocked[0]}; "
            "choose a folder open to others with KINDRED_DATA_DIR, or run Kindred as an ordinary user"
        )
    return Identity(uid=user.pw_uid, gid=user.pw_gid, capabilities=(usable[0],))


def _blocked(path: Path, user: pwd.struct_passwd) -> Iterator[Path]:
    """The parts of a path that a user may not enter, or execute, by their permission bits."""
    for part in [*reversed(path.parents), path]:
        status = part.stat()
        shift = 6 if status.st_uid == user.pw_uid else 3 if status.st_gid == user.pw_gid else 0
        if not status.st_mode >> shift & 1:
            yield part


def _capabilities() -> set[int]:
    if sys.platform != "linux":
        return set()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    bits = int(effective[1], 16) if effective else 0
    return {number for number in range(64) if bits >> number & 1}
