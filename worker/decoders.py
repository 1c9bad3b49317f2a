"""Decoding processes and the watch over them: a file may kill or stall its process, never the ingest."""

import json
import math
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from joblib import cpu_count

from app.config import Settings

Job = tuple[str, str]
"""A picture's path, and the path for its thumbnail."""
Answer = dict[str, Any]

CRASHED: Answer = {"code": "decoder-crashed", "reason": "Decoding it ended the decoding process, twice."}
_SHARE = 64
_START_TIMEOUT_S = 60.0
_START_TRIES = 3


class _Died(Exception):
    pass


class DecoderStartError(Exception):
    """A decoding process ended before it read any file: the fault is this installation's, not a file's."""


class ClosedError(Exception):
    """The pool was closed while this was decoded."""


class Decoder:
    """One child process. Not for several threads at once, except for `close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._closed = False
        self._lock = threading.Lock()

    def decode(self, jobs: Sequence[Job]) -> list[Answer]:
        """An answer for each job, whatever becomes of the process meanwhile.

        Raises `OSError` when a thumbnail cannot be written, `DecoderStartError` when no process can be started.
        """
        answers: list[Answer] = []
        try:
            process = self._ask(jobs)
            while len(answers) < len(jobs):
                # Due within the time of one file, since the answers for small ones are told in between.
                answers += self._answers(process, self._settings.decode_timeout_s)
        except (_Died, TimeoutError):
            # The process gathers answers, so the guilty file is not known: the rest go one by one.
            self._stop()
            answers += [self._decode_alone(job) for job in jobs[len(answers) :]]
        for answer in answers:
            if "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answers

    def _decode_alone(self, job: Job) -> Answer:
        """The second try of a file, with nothing else to blame."""
        try:
            return self._answers(self._ask([job]), self._settings.decode_timeout_s)[0]
        except TimeoutError:
            self._stop()
            limit = self._settings.decode_timeout_s
            return {"code": "decoder-timeout", "reason": f"Decoding it takes longer than {limit:g} s."}
        except _Died:
            self._stop()
            return CRASHED

    def _ask(self, jobs: Sequence[Job]) -> subprocess.Popen[bytes]:
        process = self._running()
        assert process.stdin is not None  # noqa: S101 - it is a pipe
        try:
            process.stdin.write(json.dumps(jobs).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise _Died from error
        return process

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started when there is none; it says when it is ready to read."""
        for _ in range(_START_TRIES):
            with self._lock:
                if self._closed:
                    raise ClosedError
                if self._process is not None:
                    return self._process
                self._buffer = b""
                process = self._process = _start(self._settings)
            try:
                self._answers(process, _START_TIMEOUT_S)
            except (_Died, TimeoutError):
                self._stop()
            else:
                return process
        raise DecoderStartError(
            f"a decoding process ended with status {process.returncode} before it read a file, {_START_TRIES} times"
        )

    def _answers(self, process: subprocess.Popen[bytes], timeout_s: float) -> list[Answer]:
        """Those of one line."""
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            block = os.read(process.stdout.fileno(), 65536)
            if not block:
                raise _Died
            self._buffer += block
        line, self._buffer = self._buffer.split(b"\n", 1)
        answers: list[Answer] = json.loads(line)
        return answers

    def _stop(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def kill(self) -> None:
        """End the process for good; whoever waits for it gets `ClosedError`."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        self.kill()
        self._stop()


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    limits = (
        settings.decode_memory_bytes,
        settings.max_image_pixels,
        settings.thumbnail_pixels,
        math.ceil(settings.decode_timeout_s),
    )
    return subprocess.Popen(
        [sys.executable, "-m", "worker.decode", *map(str, limits)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # It reads what strangers send: it gets no address and no password.
        env={name: value for name, value in os.environ.items() if not name.startswith("KINDRED_")},
    )


class DecoderPool:
    """Several decoders, a thread each."""

    def __init__(self, settings: Settings) -> None:
        self._size = settings.ingest_processes or cpu_count()
        self._free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        self._decoders = [Decoder(settings) for _ in range(self._size)]
        for decoder in self._decoders:
            self._free.put(decoder)
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="decoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Killing the processes frees the threads that wait for them; nothing is written afterwards.
            for decoder in self._decoders:
                decoder.kill()
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        for decoder in self._decoders:
            decoder.close()

    def submit(self, jobs: Sequence[Job]) -> list[Future[list[Answer]]]:
        """Share the jobs out; the answers of all futures, in order, are those of the jobs."""
        share = max(1, min(_SHARE, math.ceil(len(jobs) / self._size)))
        return [self._threads.submit(self._decode, jobs[start : start + share]) for start in range(0, len(jobs), share)]

    def _decode(self, jobs: Sequence[Job]) -> list[Answer]:
        decoder = self._free.get()
        try:
            return decoder.decode(jobs)
        finally:
            self._free.put(decoder)
