"""`kindred up` as a user meets it: the real command, the real children."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, inspect

from app.config import Settings
from app.embedded import running_servers
from app.up import StartError, running_service, running_url
from tests.e2e.conftest import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

KINDRED = Path(sys.executable).with_name("kindred")


def environment(data_dir: Path, port: int, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KINDRED_")}
    return clean | {"KINDRED_DATA_DIR": str(data_dir), "KINDRED_PORT": str(port)} | more


@contextmanager
def kindred_up(data_dir: Path, port: int, **more: str) -> Iterator[subprocess.Popen[str]]:
    with (
        (data_dir.parent / "out.txt").open("w") as output,
        subprocess.Popen(
            [KINDRED, "up"],
            env=environment(data_dir, port, **more),
            cwd=data_dir.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)


def processes_of(data_dir: Path) -> dict[int, str]:
    """Everything that runs for a data folder, by what it was given: its path, or its inode."""
    marks = (
        f"KINDRED_DATA_DIR={data_dir}\0".encode(),
        f"-{data_dir.stat().st_ino:016x}".encode() if data_dir.exists() else b"never",
    )
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            said = (folder / "cmdline").read_bytes()
            if any(mark in said + (folder / "environ").read_bytes() for mark in marks):
                found[int(folder.name)] = said.replace(b"\0", b" ").decode()
    return found


def worker(data_dir: Path, name: str) -> int | None:
    return next((pid for pid, said in processes_of(data_dir).items() if f"{name}@%h" in said), None)


def run_up(data_dir: Path, port: int, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KINDRED, "up"], env=environment(data_dir, port, **more), capture_output=True, text=True, timeout=60
    )


def test_it_starts_heals_and_stops_without_a_trace(tmp_path: Path):
    data_dir, port = tmp_path / "var", free_port()
    url = f"http://127.0.0.1:{port}"
    output = tmp_path / "out.txt"
    with kindred_up(data_dir, port) as process:
        wait_for(lambda: f"Kindred is ready: {url}\n" in output.read_text())
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert running_url(data_dir) == url

        assert "It answers this machine only." in output.read_text()

        second = run_up(data_dir, free_port())
        assert second.returncode == 1
        assert second.stdout == ""
        assert second.stderr == (
            f"kindred: the data folder {data_dir} is in use by process {process.pid}, which serves {url}\n"
        )

        wait_for(lambda: re.search(r"^train +\| .*ready", output.read_text(), re.MULTILINE))
        first = worker(data_dir, "train")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: worker(data_dir, "train") not in (None, first))

        names = {line.partition("|")[0] for line in output.read_text().splitlines() if "|" in line}
        assert {"postgres ", "valkey   ", "api      ", "ingest   ", "train    "} <= names
        passwords = re.findall(r"requirepass (\S+)", (data_dir / "valkey" / "valkey.conf").read_text())
        assert passwords[0] not in output.read_text() + " ".join(processes_of(data_dir).values())

        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert "Traceback" not in output.read_text()
    assert processes_of(data_dir) == {}
    assert not [path for path in data_dir.rglob("*") if path.is_socket()]
    assert running_url(data_dir) is None


def test_killed_it_takes_everything_along_and_starts_again(tmp_path: Path):
    data_dir, port = tmp_path / "var", free_port()
    output = tmp_path / "out.txt"
    with kindred_up(data_dir, port) as process:
        wait_for(lambda: "Kindred is ready" in output.read_text())
        process.kill()
        process.wait()
        assert running_url(data_dir) is None
        wait_for(lambda: not processes_of(data_dir))
    with kindred_up(data_dir, port) as process:
        wait_for(lambda: "Kindred is ready" in output.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert processes_of(data_dir) == {}


def test_interrupted_while_starting_it_leaves_nothing(tmp_path: Path):
    data_dir = tmp_path / "var"
    with kindred_up(data_dir, free_port()) as process:
        wait_for((data_dir / "run").exists)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert processes_of(data_dir) == {}
    assert "Traceback" not in (tmp_path / "out.txt").read_text()


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_up(tmp_path / "var", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"kindred: port {port} on 127.0.0.1 is taken; choose another with KINDRED_PORT, or, if a Kindred listens "
        "there, name it to the command by KINDRED_SERVER\n"
    )
    assert not (tmp_path / "var" / "postgres").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])  # noqa: S104 - to be refused
def test_only_this_machine_may_call(tmp_path: Path, host: str):
    settings = Settings(data_dir=tmp_path / "var", host=host)
    with (
        pytest.raises(StartError, match=f"^{re.escape(host)} is not an address of this machine alone"),
        running_service(settings),
    ):
        pass
    assert not (tmp_path / "var").exists()


def kindred(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KINDRED, *arguments], env=environment(data_dir, 8000), capture_output=True, text=True, timeout=60
    )


def test_with_a_key_it_may_listen_to_other_machines(tmp_path: Path):
    data_dir, port = tmp_path / "var", free_port()
    output = tmp_path / "out.txt"
    early = kindred(data_dir, "keys", "list")
    assert early.returncode == 1
    assert f"there is no database in {data_dir}; start the command where the service was started" in early.stderr
    assert not data_dir.exists()
    created = kindred(data_dir, "keys", "create", "first", "--scope", "admin")  # nothing runs yet
    first = created.stdout.strip()
    assert f"every request to the service on {data_dir} needs a key" in created.stderr
    with kindred_up(data_dir, port, KINDRED_HOST="0.0.0.0", KINDRED_API_KEY="not for the children") as process:  # noqa: S104 - a key lets it
        wait_for(lambda: "Kindred is ready" in output.read_text())
        assert "every request needs a key" in output.read_text()
        for host in ("127.0.0.1", socket.gethostbyname(socket.gethostname())):
            url = f"http://{host}:{port}/v1/keys"
            assert httpx.get(url).status_code == 401
            assert httpx.get(url, headers={"Authorization": f"Bearer {first}"}).status_code == 200
        children = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes_of(data_dir) if pid != process.pid]
        assert children
        assert not [words for words in children if b"KINDRED_API_KEY" in words]

        # Of the service that runs.
        second = kindred(data_dir, "keys", "create", "second", "--tenant", "acme").stdout.strip()
        listed = kindred(data_dir, "keys", "list").stdout
        assert [first[8:24] in listed, second[8:24] in listed, "acme" in listed] == [True, True, True]
        assert first not in listed
        collections = f"http://127.0.0.1:{port}/v1/collections"
        headers = {"Authorization": f"Bearer {second}"}
        assert httpx.get(collections, headers=headers).json()["items"] == []
        assert kindred(data_dir, "keys", "revoke", second[:24]).returncode == 0
        assert httpx.get(collections, headers=headers).status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    said = output.read_text() + (data_dir / "logs" / "servers.log").read_text()
    assert first[25:] not in said
    assert second[25:] not in said


def test_servers_of_one_s_own_are_used_and_left_running(tmp_path: Path):
    data_dir = tmp_path / "var"
    with running_servers(tmp_path / "servers") as urls:
        settings = Settings(
            data_dir=data_dir, port=free_port(), database_url=urls.database_url, broker_url=urls.broker_url
        )
        with running_service(settings) as url:
            assert httpx.get(f"{url}/readyz").status_code == 200
            assert not (data_dir / "postgres").exists()
            assert not (data_dir / "valkey").exists()
        engine = create_engine(urls.database_url)
        assert "alembic_version" in inspect(engine).get_table_names()
        engine.dispose()


def test_a_database_that_is_not_there_is_one_clear_line(tmp_path: Path):
    url = f"postgresql+psycopg://kindred:secret@127.0.0.1:{free_port()}/kindred"
    done = run_up(tmp_path / "var", free_port(), KINDRED_DATABASE_URL=url, KINDRED_BROKER_URL="redis://127.0.0.1:1")
    assert done.returncode == 1
    assert re.fullmatch(r"kindred: the database cannot be used: .*Connection refused.*\n", done.stderr)
    assert "secret" not in done.stderr + done.stdout
