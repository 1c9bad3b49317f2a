import os
import subprocess
import sys
from pathlib import Path

# In a file of its own, since a spawned process imports the main module anew.
PARENT = """
import os, time
from benchmarks.children import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_a_killed_command_leaves_no_process_behind(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid  # the child is at work
        parent.kill()
        assert parent.communicate(timeout=10)[0] == ""  # nobody holds the output any more
