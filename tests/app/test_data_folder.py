import subprocess
import sys
from pathlib import Path

import pytest

from app.data_folder import Owner, owned_folder, owner
from app.processes import StartError

OWNING = """
import sys, time
from pathlib import Path
from app.data_folder import owned_folder
with owned_folder(Path(sys.argv[1])) as folder:
    folder.announce(url="http://127.0.0.1:8000", ready=True)
    print("owned", flush=True)
    time.sleep(100)
"""


def test_a_folder_has_one_owner_whom_others_can_ask_for(tmp_path: Path):
    data_dir = tmp_path / "new" / "var"
    command = [sys.executable, "-c", OWNING, str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "owned\n"
        assert owner(data_dir) == Owner(pid=process.pid, url="http://127.0.0.1:8000", ready=True)
        with (
            pytest.raises(StartError, match=f"in use by process {process.pid}, which serves http://127.0.0.1:8000$"),
            owned_folder(data_dir),
        ):
            pass
        process.kill()
        process.wait()
        assert owner(data_dir) is None
        with owned_folder(data_dir) as folder:
            assert folder.path == data_dir
        assert owner(data_dir) is None


def test_nobody_owns_a_folder_that_does_not_exist(tmp_path: Path):
    assert owner(tmp_path / "missing") is None


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            StartError, match=r"file/var cannot be used \(Not a directory\); choose another with KINDRED_DATA_DIR"
        ),
        owned_folder(tmp_path / "file" / "var"),
    ):
        pass
