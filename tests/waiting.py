"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], timeout_s: float = 90.0, every_s: float = 0.02) -> Any:
    """What `condition` says once it is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(every_s)
