import os
import subprocess
import sys
from pathlib import Path

MANY = """
from pathlib import Path

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(8))
def test(worker_id, number):
    Path(__file__).with_name(f"{number}-{worker_id}").touch()
"""


def test_tests_of_a_group_run_in_one_process(tmp_path: Path):
    """Else each process starts a stack of its own, and no test says so."""
    (tmp_path / "test_many.py").write_text(MANY)
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = (sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider")
    done = subprocess.run(command, cwd=tmp_path, env=outer, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    ran = [path.name.split("-") for path in tmp_path.glob("?-gw?")]
    assert len(ran) == 8
    assert len({process for _, process in ran}) == 1
