"""Writes what this worker counts where the API reads it, every 15 s."""

import threading

import structlog

from app import metrics

log = structlog.get_logger(__name__)

EVERY_S = 15.0


class Reporter(threading.Thread):
    def __init__(self, name: str, stop: threading.Event) -> None:
        super().__init__(name="reporter", daemon=True)
        self._worker, self._stopping = name, stop

    def run(self) -> None:
        while True:
            try:
                metrics.write_worker(self._worker)
            except OSError as error:
                log.warning("metrics_not_written", error=type(error).__name__)
            if self._stopping.wait(EVERY_S):
                break
        metrics.remove_worker(self._worker)
