"""A whole upload over HTTP into the running service: speed, memory, and how the API answers meanwhile.

    python -m benchmarks.upload --data ARCHIVE

Starts the embedded service on a folder of its own and sends the archive twice. Prints the seconds until it is
received and until it is ingested, the peak memory of the API, the ingest worker and its decoders (Linux: VmHWM),
the latency of `/healthz` meanwhile, and what the second sending added.
"""

import argparse
import os
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.client import Client
from app.config import Settings
from app.up import running_service

PROCESSES = {"API": "app.main", "ingest worker": "-Q ingest", "decoder": "worker.decode"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an archive")
    parser.add_argument("--port", type=int, default=8128)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kindred-upload-", dir=os.environ.get("KINDRED_DATA_DIR")) as folder:
        settings = Settings(data_dir=Path(folder), port=arguments.port, database_url=None, broker_url=None)
        with running_service(settings) as url, Client(url) as client:
            time.sleep(3)  # until the workers stand
            created = httpx.post(f"{url}/v1/collections", json={"name": arguments.data.name}).raise_for_status()
            collection = created.headers["location"]
            before, watched = memory_mib(), Watch(url)
            with watched:
                started = time.perf_counter()
                upload = send(url, arguments.data, collection)
                received = time.perf_counter()
                first = ingested(client, upload)
                ended = time.perf_counter()
            after = watched.peaks_mib
            images = first["counts"]["received"]
            print(f"{images} files: received in {received - started:.1f} s, ingested {ended - received:.1f} s later")
            print(f"ingest: {images / (ended - received):.0f} images/s; {first['counts']}")
            for name in PROCESSES:
                print(f"peak memory {after.get(name, 0):5.0f} MiB {name} (idle: {before.get(name, 0):.0f} MiB)")
            latency = sorted(watched.latencies_ms)
            p99 = latency[int(len(latency) * 0.99)]
            print(f"/healthz: {len(latency)} calls, median {statistics.median(latency):.1f} ms, p99 {p99:.1f} ms")
            started = time.perf_counter()
            second = ingested(client, send(url, arguments.data, collection))
            print(f"sent again: {time.perf_counter() - started:.1f} s, {second['counts']}")


class Watch:
    """Memory of the service's processes and the latency of its liveness, every tenth of a second."""

    def __init__(self, url: str) -> None:
        self.latencies_ms: list[float] = []
        self.peaks_mib: dict[str, float] = {}
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url) as http:
            while not self._over.wait(0.1):
                started = time.perf_counter()
                http.get("/healthz").raise_for_status()
                self.latencies_ms.append((time.perf_counter() - started) * 1000)
                for name, mib in memory_mib().items():
                    self.peaks_mib[name] = max(mib, self.peaks_mib.get(name, 0))


def memory_mib() -> dict[str, float]:
    """The largest peak so far of each kind of process below this one."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
        name = next((name for name, words in PROCESSES.items() if words in command), None)
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if name is not None and peak is not None:
            found[name] = max(found.get(name, 0.0), int(peak[1]) / 1024)
    return found


def send(url: str, archive: Path, collection: str) -> str:
    """Send the archive as one streamed part; the upload's path."""
    with httpx.Client(base_url=url, timeout=600) as http, archive.open("rb") as file:
        answer = http.post(f"{collection}/uploads", files={"file": (archive.name, file)})
        return answer.raise_for_status().headers["location"]


def ingested(client: Client, upload: str) -> dict[str, Any]:
    *_, last = client.watch(upload, every_s=0.1)
    assert last["state"] == "succeeded", last["problem"]
    return last


if __name__ == "__main__":
    main()
