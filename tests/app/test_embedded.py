"""The embedded servers, for real: every test starts PostgreSQL and Valkey from their wheels."""

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from kombu import Connection
from sqlalchemy import make_url

from app.data_folder import owner
from app.embedded import postgres_server, running_servers, valkey_server
from app.embedded.places import wheel
from app.processes import StartError, launch_command
from tests.app.servers import answers, execute, postmaster, servers_of, socket_of, valkey
from tests.waiting import wait_for


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
        wheel("no_such_wheel")
