"""The command line of the trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import settings
from worker.command import gpus, trainer_command

FULL, FINETUNE, HEAD = {"train": "full"}, {"train": "finetune"}, {"train": "head"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch):
    for name in ("KINDRED_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


def set_gpus(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KINDRED_GPUS", value)
    settings.cache_clear()


@pytest.mark.parametrize(
    ("visible", "seen"), [("0", 1), ("0,1,2", 3), ("", 0), ("-1", 0), ("2,-1,3", 1), ("GPU-8932f937, MIG-1", 2)]
)
def test_the_devices_that_cuda_may_see_are_counted(monkeypatch: pytest.MonkeyPatch, visible: str, seen: int):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == seen


def test_the_driver_is_asked_where_nothing_else_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n"
        "echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus() == 2
    set_gpus(monkeypatch, "7")
    assert gpus() == 7


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == 0


@pytest.mark.parametrize(("count", "parameters"), [("0", FULL), ("1", FULL), ("4", HEAD), ("4", {})])
def test_one_process_trains_a_head_or_on_one_device(monkeypatch: pytest.MonkeyPatch, count: str, parameters: dict):
    set_gpus(monkeypatch, count)
    command = trainer_command(Path("/run"), parameters)
    assert command[-4:] == [sys.executable, "-m", "worker.trainer", "/run"]
    launcher, order = command[:4], json.loads(command[4])
    assert Path(launcher[-1]).name == "launcher.py"
    assert order["death_signal"] == 9


@pytest.mark.parametrize("parameters", [FULL, FINETUNE])
def test_several_devices_train_a_network_by_torchrun_that_dies_with_us(
    parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    set_gpus(monkeypatch, "4")
    command = trainer_command(Path("/run"), parameters)
    at = command.index("-m")
    assert command[at - 1 :] == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
        "-m", "worker.trainer", "/run",
    ]  # fmt: skip
    launcher, order = command[:4], json.loads(command[4])
    assert Path(launcher[-1]).name == "launcher.py"
    assert order["death_signal"] == 9


@pytest.mark.slow
def test_torchrun_takes_those_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The real program with the real options, up to the trainer's complaint that nothing is specified."""
    set_gpus(monkeypatch, "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = subprocess.run(trainer_command(tmp_path, FULL), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"No such file or directory: '{tmp_path / 'specification.json'}'" in done.stderr
    # torchrun says so where it starts several; it ends the others with the first, which may be before they complain.
    assert "OMP_NUM_THREADS environment variable for each process" in done.stderr
