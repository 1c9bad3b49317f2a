"""Ingest against the work it cannot do without.

    python -m benchmarks.ingest --data ZIP [--rounds N]

The bare loop opens the members of the archive, decodes them and encodes their thumbnails to memory, in one
process a core. The ingest does all of it: bytes counted and hashed, files durable, rows in PostgreSQL. Both run
on this machine, by turns; KINDRED_DATABASE_URL names an empty database. Prints images a second of both, their
ratio, and the peak memory of the ingesting process. `benchmarks.upload` measures the whole service.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from pathlib import Path

from joblib import cpu_count

from app import storage
from app.config import settings
from app.db.migrate import upgrade
from app.db.session import engine, open_session
from app.services import collections, uploads
from app.services.uploads import ReceivedPart
from worker.decode import picture
from worker.ingest import ingest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a zip archive of images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=cpu_count())
    parser.add_argument("--role", choices=("bare", "ingest"), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "bare":
        bare(arguments.data, arguments.share, arguments.processes)
    elif arguments.role == "ingest":
        measure_ingest(arguments.data)
    else:
        compare(arguments.data, arguments.rounds, arguments.processes)


def compare(data: Path, rounds: int, processes: int) -> None:
    with zipfile.ZipFile(data) as archive:
        files = sum(not member.is_dir() for member in archive.infolist())
    upgrade(settings().database_url or "")
    bare_rates, bare_cpu, ingest_rates, peaks = [], [], [], []
    # What a round wrote is removed at the end only: for minutes after many files were removed, ext4 makes
    # new ones up to twenty times slower, since it looks for inodes that were not in use lately.
    with tempfile.TemporaryDirectory(prefix="kindred-ingest-", dir=os.environ.get("KINDRED_DATA_DIR")) as folder:
        for number in range(rounds):
            shares = [["--role", "bare", "--share", str(share)] for share in range(processes)]
            answers = _run(data, shares, processes, Path(folder) / str(number))
            bare_rates.append(files / max(answer["seconds"] for answer in answers))
            bare_cpu.append(sum(answer["cpu_s"] for answer in answers) / files * 1e6)
            (answer,) = _run(data, [["--role", "ingest"]], processes, Path(folder) / str(number))
            ingest_rates.append(answer["received"] / answer["seconds"])
            peaks.append(answer)
            print(f"round {number + 1}: bare {bare_rates[-1]:.0f}/s, ingest {ingest_rates[-1]:.0f}/s", flush=True)
    ratios = [ours / bare_rate for ours, bare_rate in zip(ingest_rates, bare_rates, strict=True)]
    print(f"{files} images, {processes} processes, median of {rounds} rounds")
    print(f"bare loop   {statistics.median(bare_rates):8.0f} images/s")
    print(f"ingest      {statistics.median(ingest_rates):8.0f} images/s")
    print(f"ratio       {statistics.median(ratios):8.2f}   (each round: {', '.join(f'{r:.2f}' for r in ratios)})")
    ingest_cpu = statistics.median(peak["cpu_s"] for peak in peaks) / files * 1e6
    print(f"CPU time    {statistics.median(bare_cpu):8.0f} us an image, bare loop")
    print(f"            {ingest_cpu:8.0f} us an image, ingest without PostgreSQL's share")
    print(f"peak memory {max(p['peak_mib'] for p in peaks):8.0f} MiB ingesting process")


def _run(data: Path, roles: list[list[str]], processes: int, folder: Path) -> list[dict[str, float]]:
    """Each role in a process of its own, all at once; what they print."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--data", str(data), "--processes", str(processes)]
    environment = {**os.environ, "KINDRED_DATA_DIR": str(folder), "KINDRED_BROKER_URL": "redis://127.0.0.1:1/0"}
    children = [
        subprocess.Popen([*command, *role], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        for role in roles
    ]
    outputs = [child.communicate()[0] for child in children]
    assert all(child.returncode == 0 for child in children), "a measured process failed"
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def bare(data: Path, share: int, processes: int) -> None:
    started = time.perf_counter()
    with zipfile.ZipFile(data) as archive:
        for member in archive.infolist()[share::processes]:
            if not member.is_dir():
                picture(io.BytesIO(archive.read(member)), max_pixels=10**8, thumbnail_pixels=256)
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu_s": time.process_time()}))


def measure_ingest(data: Path) -> None:
    upload_id = uuid.uuid4()
    part = storage.incoming_part(upload_id, 0)
    part.parent.mkdir(parents=True)
    shutil.copyfile(data, part)
    with open_session() as session:
        collection = collections.create(session, "benchmark")
        uploads.create(session, upload_id, collection.id, [ReceivedPart(filename=data.name, bytes=part.stat().st_size)])
        session.commit()
    os.sync()
    started = time.perf_counter()
    ingest(upload_id, threading.Event())
    seconds = time.perf_counter() - started
    with open_session() as session:
        upload = uploads.get(session, upload_id)
        assert upload.state == "succeeded", upload.problem
        received = upload.received
        collections.remove(session, collection.id)
        session.commit()
    engine().dispose()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    peak_mib = used[0].ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "received": received, "cpu_s": cpu_s, "peak_mib": peak_mib}))


if __name__ == "__main__":
    main()
