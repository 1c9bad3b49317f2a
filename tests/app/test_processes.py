import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

import pytest

from app.processes import Child, Output, StartError, Supervisor, signals_interrupt
from tests.waiting import wait_for

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def shell(name: str, script: str, cwd: Path, **more: object) -> Child:
    return Child(name=name, command=["/bin/sh", "-c", script], environment=ENVIRONMENT, cwd=cwd, **more)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def said() -> StringIO:
    return StringIO()


@pytest.fixture
def supervisor(said: StringIO) -> Iterator[Supervisor]:
    with Supervisor(Output(said)) as supervisor:
        yield supervisor


def test_lines_carry_the_name_of_their_process_and_never_tear(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    script = "i=0; while [ $i -lt 300 ]; do printf abcde; printf 'fghij\\n'; i=$((i+1)); done; sleep 100"
    supervisor.start(shell("one", script, tmp_path), shell("another", script, tmp_path))
    wait_for(lambda: said.getvalue().count("\n") == 600, timeout_s=5.0)
    assert set(said.getvalue().splitlines()) == {"one      | abcdefghij", "another  | abcdefghij"}


def test_colours_are_for_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    # A terminal may hand a line over in parts.
    with os.fdopen(ours, "rb") as screen, os.fdopen(theirs, "w") as terminal:
        Output(terminal).line("api", "hello")
        assert screen.readline() == b"\x1b[36mapi      |\x1b[0m hello\r\n"
        monkeypatch.setenv("NO_COLOR", "1")
        Output(terminal).line("api", "hello")
        assert screen.readline() == b"api      | hello\r\n"


def test_children_go_on_when_nobody_reads_any_more(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    output = Output(stream)
    output.line("api", "hello")
    output.line("api", "hello")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_log_is_private_and_does_not_grow_without_end(tmp_path: Path):
    path = tmp_path / "logs" / "kindred.log"
    with Output.to_file(path) as output:
        output.line("api", "x" * (11 * 1024 * 1024))
    with Output.to_file(path) as output:
        output.line("api", "fresh")
    assert path.read_text() == "api      | fresh\n"
    assert path.with_name("kindred.log.1").stat().st_size > 11 * 1024 * 1024
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_killed_child_is_back_within_a_second(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    supervisor.start(shell("train", "echo up; exec sleep 100", tmp_path))
    wait_for(lambda: "up" in said.getvalue(), timeout_s=5.0)
    first = supervisor.pids()["train"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: said.getvalue().count("| up\n") == 2, timeout_s=2.0)
    assert supervisor.pids()["train"] != first
    assert "train    | killed by SIGKILL; starting it again in 0.1 s\n" in said.getvalue()


def test_a_grandchild_that_keeps_the_pipe_open_does_not_delay_that(
    supervisor: Supervisor, said: StringIO, tmp_path: Path
):
    supervisor.start(shell("train", "setsid sleep 3 & echo up; exec sleep 100", tmp_path))
    wait_for(lambda: "up" in said.getvalue(), timeout_s=5.0)
    os.kill(supervisor.pids()["train"], signal.SIGKILL)
    wait_for(lambda: said.getvalue().count("| up\n") == 2, timeout_s=2.0)


def test_what_is_left_of_its_group_dies_with_a_child(supervisor: Supervisor, tmp_path: Path):
    supervisor.start(shell("train", "sleep 100 & echo $! > helper; wait", tmp_path))
    helper = tmp_path / "helper"
    wait_for(lambda: helper.exists() and helper.read_text(), timeout_s=5.0)
    helper_pid = int(helper.read_text())
    helper.unlink()
    os.kill(supervisor.pids()["train"], signal.SIGKILL)
    wait_for(lambda: not alive(helper_pid), timeout_s=5.0)


def test_a_child_that_keeps_dying_is_given_up(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    begin = time.monotonic()
    supervisor.start(shell("train", "echo $$ >> starts; exit 3", tmp_path))
    with pytest.raises(
        StartError, match=r"^train died 5 times within 60 s \(last: exited with status 3\) and is given up$"
    ):
        supervisor.wait()
    assert 1.5 <= time.monotonic() - begin < 10.0  # 0.1 + 0.2 + 0.4 + 0.8 s between five starts
    assert len((tmp_path / "starts").read_text().split()) == 5
    with pytest.raises(StartError):
        supervisor.check()


def test_a_quiet_failure_says_where_the_output_is(tmp_path: Path):
    path = tmp_path / "kindred.log"
    with Output.to_file(path) as output, Supervisor(output) as supervisor:
        child = Child(name="api", command=["/no/such/program"], environment={}, cwd=tmp_path)
        supervisor.start(child)
        with pytest.raises(StartError, match=f"its output is in {path}"):
            supervisor.wait()
    assert "cannot start /no/such/program: [Errno 2] No such file or directory" in path.read_text()


def test_a_start_that_is_pointless_is_not_tried(supervisor: Supervisor, tmp_path: Path):
    def refuse() -> None:
        raise StartError("the moon is full")

    supervisor.start(shell("api", "touch started", tmp_path, before_start=refuse))
    with pytest.raises(StartError, match="api cannot be started: the moon is full"):
        supervisor.wait()
    assert not (tmp_path / "started").exists()


def test_the_last_started_stop_first_and_those_started_together_stop_together(
    supervisor: Supervisor, said: StringIO, tmp_path: Path
):
    def child(name: str, delay_s: float) -> Child:
        script = f"trap 'sleep {delay_s}; echo {name} >> order; exit 0' TERM; echo up; while :; do sleep 0.05; done"
        return shell(name, script, tmp_path)

    supervisor.start(child("postgres", 0))
    supervisor.start(child("slow", 0.6), child("quick", 0.1), child("medium", 0.4))
    wait_for(lambda: said.getvalue().count("up") == 4, timeout_s=5.0)
    supervisor.stop()
    assert (tmp_path / "order").read_text().split() == ["quick", "medium", "slow", "postgres"]
    assert supervisor.pids() == {}


STUBBORN = "trap 'echo no' TERM; echo up; while :; do sleep 0.05; done"


def test_a_child_that_does_not_stop_is_killed(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    supervisor.start(shell("train", STUBBORN, tmp_path, stop_timeout_s=0.3))
    wait_for(lambda: "up" in said.getvalue(), timeout_s=5.0)
    pid = supervisor.pids()["train"]
    begin = time.monotonic()
    supervisor.stop()
    assert 0.3 <= time.monotonic() - begin < 5.0
    assert not alive(pid)
    assert "no" in said.getvalue()


def test_a_second_ctrl_c_shortens_the_stop(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    supervisor.start(shell("train", STUBBORN, tmp_path, stop_timeout_s=60))
    wait_for(lambda: "up" in said.getvalue(), timeout_s=5.0)
    begin = time.monotonic()
    impatience = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    impatience.start()
    supervisor.stop()
    impatience.join()
    assert 2.0 <= time.monotonic() - begin < 10.0


def test_a_stop_during_the_pause_before_a_restart_ends_it(supervisor: Supervisor, said: StringIO, tmp_path: Path):
    supervisor.start(shell("train", "echo $$ >> starts; exit 1", tmp_path))
    wait_for(lambda: "0.8 s" in said.getvalue(), timeout_s=5.0)
    supervisor.stop()
    assert len((tmp_path / "starts").read_text().split()) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_to_stop_unwind_like_ctrl_c(number: signal.Signals):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests inherit a SIGHUP that is ignored
    try:
        with pytest.raises(KeyboardInterrupt), signals_interrupt():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_impatience_does_not_interrupt_the_unwinding():
    unwound = []

    def interrupted_twice() -> None:
        with signals_interrupt():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                unwound.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert unwound == ["all of it"]


SUPERVISING = """
import sys, time
from pathlib import Path
from app.processes import Child, Output, Supervisor
with Supervisor(Output(sys.stdout)) as supervisor:
    for name, command in (("plain", "exec sleep 100"), ("stubborn", "trap '' TERM INT; sleep 100 & wait")):
        supervisor.start(
            Child(name=name, command=["/bin/sh", "-c", command], environment={"PATH": "/bin:/usr/bin"}, cwd=Path("/"))
        )
    while len(supervisor.pids()) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
    print("pids", *supervisor.pids().values(), flush=True)
    time.sleep(100)
"""


def test_children_die_with_a_killed_parent(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", SUPERVISING], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = next([int(pid) for pid in line.split()[1:]] for line in parent.stdout if line.startswith("pids"))
        assert all(map(alive, pids))
        parent.kill()
        wait_for(lambda: not any(map(alive, pids)), timeout_s=2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"command": ["sleep", "1"]}, "must begin with an absolute path"),
        ({"command": []}, "must begin with an absolute path"),
        ({"stop_timeout_s": 0.0}, "stop_timeout_s must be above 0, not 0.0"),
    ],
)
def test_nonsense_is_refused_at_birth(wrong: Mapping[str, object], message: str, tmp_path: Path):
    right = {"name": "api", "command": ["/bin/true"], "environment": {}, "cwd": tmp_path}
    with pytest.raises(ValueError, match=message):
        Child(**(right | wrong))
