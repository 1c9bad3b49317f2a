"""Becomes another program that dies with its parent, as another user where asked.

Run as a script, by path and with `-I -S`, so that it starts in milliseconds: standard library only. It is no
`preexec_fn`, because the supervisor has threads, and Python between fork and exec could deadlock there.
"""

import ctypes
import json
import os
import signal
import struct
import sys

# linux/prctl.h, linux/capability.h, linux/securebits.h
_PR_SET_PDEATHSIG = 1
_PR_SET_SECUREBITS = 28
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 4
_CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    order = json.loads(sys.argv[1])
    command = sys.argv[2:]
    if order["uid"] is not None:
        _become(order["uid"], order["gid"], order["capabilities"])
    if sys.platform == "linux":
        # After the change of user, which clears it.
        _prctl(_PR_SET_PDEATHSIG, order["death_signal"])
    if os.getppid() != order["parent"]:
        sys.exit("the parent died first")
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # Python ignores or handles these
        signal.signal(number, signal.SIG_DFL)
    os.execve(command[0], command, os.environ)  # noqa: S606 - becoming that program is the purpose


def _become(uid: int, gid: int, capabilities: list[int]) -> None:
    """Drop to a user for good, but keep `capabilities` across the coming exec."""
    if capabilities:
        # With the fix-up, setuid clears every capability, and access(2) ignores them for users other than
        # root: initdb, which asks access(2) about its siblings, would not find `postgres`.
        _prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if capabilities:
        mask = sum(1 << capability for capability in capabilities)
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        # effective, permitted, inheritable; the second triple is for capabilities above 31
        if _libc().capset(header, struct.pack("=6I", mask, mask, mask, 0, 0, 0)) != 0:
            raise OSError(ctypes.get_errno(), "capset")
        for capability in capabilities:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def _prctl(option: int, first: int, second: int = 0) -> None:
    if _libc().prctl(*map(ctypes.c_ulong, (option, first, second, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {first}, {second})")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"cannot start {sys.argv[2]}: {error}")
