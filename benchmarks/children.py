"""Processes that measure, and that end with the command that started them, however it ends."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def processes(count: int) -> ProcessPoolExecutor:
    """So many, each of them new, so that nothing before it counts in its time and its memory."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_the_parent)


def end_with_the_parent() -> None:
    """A killed parent takes no child along: left alone, it would measure on to its end, on a core that others time."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
